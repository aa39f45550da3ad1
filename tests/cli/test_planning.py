"""What `organseg plan` writes, added to every shipped experiment as it says."""

from pathlib import Path
from typing import Any

import pytest
from synthetic import make_cache, write_dataset

from organseg.cli import run
from organseg.cli.configs import load_config, merge
from organseg.cli.modules import build_module
from organseg.networks import NNUNet
from organseg.volumes import WorkingGrid

EXPERIMENTS = {
    path.stem: load_config(path) for path in (Path(__file__).parents[2] / "configs/experiment").glob("*.yaml")
}
TRANSFORMERS = {
    name for name, config in EXPERIMENTS.items() if config["model"]["class_path"].endswith("TransformerModule")
}
VOLUMES = {name for name, config in EXPERIMENTS.items() if config["data"]["class_path"].endswith("PatchDataModule")}
assert TRANSFORMERS and VOLUMES


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    return make_cache(write_dataset(folder / "set", 2), folder / "cache")


def planned(cache: Path, out: Path, *words: object) -> dict[str, Any]:
    assert run([str(word) for word in ("plan", cache, "--width", 24, "--out", out, *words)]) == 0
    return load_config(out)


@pytest.mark.parametrize("more", [(), ("--residual",), ("--precision", "32-true")])
@pytest.mark.parametrize("names, words", [
    (TRANSFORMERS - VOLUMES, ("--transformer", "--dims", 2)), (TRANSFORMERS, ("--transformer", "--dims", 3)),
    (EXPERIMENTS.keys() - TRANSFORMERS - VOLUMES, ("--dims", 2)), (VOLUMES, ("--dims", 3)),
])  # fmt: skip
def test_every_experiment_takes_the_plan(cache, tmp_path, names, words, more):
    plan = planned(cache, tmp_path / "plan.yaml", *words, *more)
    for name in names:
        before, merged = EXPERIMENTS[name], merge(EXPERIMENTS[name], plan)
        network = build_module(merged["model"], ["liver", "spleen"]).network
        inner = network.backbone if name in TRANSFORMERS else network
        assert isinstance(inner, NNUNet) and inner.channels[0] == 24
        assert len(inner.encoder[1]) == (3 if "--residual" in more else 1)
        assert merged["trainer"] == {**before["trainer"], "precision": plan["trainer"]["precision"]}
        assert merged["data"]["init_args"] == {**before["data"]["init_args"], **plan["data"]["init_args"]}
    assert plan["trainer"]["precision"] == ("32-true" if "32-true" in more else "bf16-mixed")


def test_a_shallow_transformer_has_fewer_levels(tmp_path):
    cache = make_cache(write_dataset(tmp_path / "set", 2), tmp_path / "cache", WorkingGrid(20))
    plan = planned(cache, tmp_path / "plan.yaml", "--transformer", "--dims", 2)  # 20, 10 and 5 pixels
    merged = merge(EXPERIMENTS["btcv_100_utransformer"], plan)
    assert (
        len(build_module(merged["model"], ["liver"]).network.backbone.gates)
        == merged["model"]["init_args"]["levels"]
        == 2
    )


def test_organs_of_the_cache_take_their_room(cache, tmp_path, capsys):
    more = make_cache(write_dataset(tmp_path / "more", 2, labels={2: "liver"}), tmp_path / "few")
    sizes = []
    for folder in (cache, more):
        assert run(["plan", str(folder), "--dims", "2", "--width", "4", "--memory_gb", "0.51"]) == 0
        text = capsys.readouterr().out
        sizes.append(int(text.split("batch_size: ")[1].split("}")[0]))
        assert f"{4 if folder == cache else 1} organs" in text
    assert sizes[0] < sizes[1] < 64


def test_a_data_set_without_cases_is_said(cache, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "fingerprint.json").write_bytes((cache / "tiny" / "fingerprint.json").read_bytes())
    assert run(["plan", str(tmp_path)]) == 4
    assert "no cases beside fingerprint.json; run `organseg prepare` again" in capsys.readouterr().err
