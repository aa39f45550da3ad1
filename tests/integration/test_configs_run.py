"""Every shipped experiment, through the real command: fit, test, predict and report."""

import csv
import functools
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml
from toy import TOY, organseg

from organseg.cli.configs import load_config, merge
from organseg.cli.modules import build_module
from organseg.networks import MultiHeadCrossAttention, MultiHeadSelfAttention

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))
assert EXPERIMENTS


def steps_of(config: dict[str, Any]) -> list[str]:
    """As few steps as there can be; rounds need a network that finds something."""
    curriculum = config.get("curriculum")
    small = ["--data.init_args.patch_size=[16,16,16]"] if "patch_size" in config["data"]["init_args"] else []
    if "heads" in config["model"]["init_args"]:
        small.append("--model.init_args.heads=2")
    if "patch" in config["model"]["init_args"]["network"].get("init_args", {}):
        small.append("--model.init_args.network.init_args.patch=[16,16,8]")
    if not curriculum:
        return ["--trainer.max_steps=2", *small]
    learned = ["--curriculum.score.init_args.steps=2"] if isinstance(curriculum["score"], dict) else []
    return ["--trainer.max_steps=60", "--curriculum.round_steps=2", *learned, *small]


def parts(config: Path) -> tuple[list[Any], dict[str, Any]]:
    """Method, network and rounds; and the data, whatever the share of the labels."""
    whole = load_config(config)
    options = {name: value for name, value in whole["data"]["init_args"].items() if name != "label_share"}
    return [whole["model"], whole.get("curriculum"), whole["data"]["class_path"]], options


def is_new(config: Path, part: int) -> bool:
    """Whether no experiment before it has the same method (part 0), or the same data (1)."""
    before = EXPERIMENTS[: EXPERIMENTS.index(config)]
    return all(parts(other)[part] != parts(config)[part] for other in before)


def base_of(config: Path) -> Path | None:
    """The experiment of which it is a variant, with other options of the method."""
    includes = [config.parent / part for part in yaml.safe_load(config.read_text())["include"]]
    return includes[0] if includes[0] in EXPERIMENTS else None


def coarse_of(config: Path) -> Path | None:
    """The experiment whose result it goes on from."""
    coarse = load_config(config)["model"]["init_args"].get("coarse")
    return config.with_name(f"{Path(coarse).parts[1]}.yaml") if coarse else None


WITH_COARSE = [config for config in EXPERIMENTS if coarse_of(config)]
"""They go on from another experiment's result; test_stipple.py runs those of phantoms."""
ROUND0 = [config for config in EXPERIMENTS if config.stem.endswith("_round0")]
"""Shorter trainings of another experiment."""
VARIANTS = [config for config in EXPERIMENTS if base_of(config) and config not in (*WITH_COARSE, *ROUND0)]


OTHERS = sorted({*EXPERIMENTS} - {*VARIANTS} - {*WITH_COARSE} - {*ROUND0})


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [path for path in OTHERS if is_new(path, 0) or is_new(path, 1)], ids=lambda path: path.stem
)
def test_experiment_runs_from_fit_to_predict(config: Path, toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = steps_of(load_config(config))
    cache = toy / ("fusion_cache" if config.stem.startswith("fusion") else "cache")
    organseg("fit", "--config", config, "--data.init_args.cache", cache, "--out", run, *steps, *TOY)
    last = run / "checkpoints" / "last.ckpt"
    if not is_new(config, 0):
        return  # an experiment with the same method goes on
    organseg("test", "--config", run / "config.yaml", "--ckpt_path", last)
    with (run / "test" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    organs = {row["organ"] for row in rows}
    assert len(organs) == (3 if config.stem.startswith("mirrored") else 7)
    assert len({row["case"] for row in rows}) * len(organs) == len(rows)

    # One of them also as an ensemble, with augmented views.
    checkpoints = [last, last, "--tta"] if config.stem == "btcv_100_utransformer" else [last]
    scan = toy / "phantoms" / "img" / "phantom_000.nii.gz"
    organseg("predict", "--ckpt_path", *checkpoints, "--input", scan, "--out", tmp_path / "out")
    written = nibabel.load(tmp_path / "out" / "phantom_000.nii.gz")
    given = nibabel.load(scan)
    assert written.shape == given.shape
    assert np.array_equal(written.affine, given.affine)
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert set(labels.values()) == organs

    organseg("report", run)
    assert (run / "report" / "index.html").stat().st_size > 10_000


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_is_what_its_name_says(config: Path) -> None:
    whole = load_config(config)
    share = next((int(word) for word in config.stem.split("_") if word.isdigit()), 100)
    assert whole["out"] == f"runs/{config.stem}"
    assert whole["data"]["init_args"].get("label_share", 1.0) == share / 100


@pytest.mark.parametrize(
    ("group", "steps"), [("btcv_", 2700), ("phantom_", 2700), ("btcv3d_", 600), ("fusion_", 2700), ("chaosmr_", 2700)]
)
def test_all_methods_have_the_same_number_of_steps(group: str, steps: int) -> None:
    for path in EXPERIMENTS:
        whole = load_config(path)
        if not path.stem.startswith(group) or path.stem.endswith("_l"):
            continue
        rounds = whole.get("curriculum") or {"rounds": 0, "round_steps": 0}
        coarse = coarse_of(path)
        before = load_config(coarse)["trainer"]["max_steps"] if coarse else 0
        total = before + whole["trainer"]["max_steps"] + rounds["rounds"] * rounds["round_steps"]
        assert total == (1500 if path in ROUND0 else steps), path.stem


@pytest.mark.parametrize("config", ROUND0, ids=lambda path: path.stem)
def test_a_round_0_is_its_experiment_for_fewer_steps(config: Path) -> None:
    whole, base = load_config(config), load_config(config.with_name(config.name.replace("round0", "inerrant0")))
    assert (whole.pop("out"), whole["trainer"].pop("max_steps")) == (f"runs/{config.stem}", 1500)
    assert base.pop("out") and base["trainer"].pop("max_steps") == 2700
    assert whole == base


def test_every_fragment_belongs_to_an_experiment_or_is_a_logger() -> None:
    used = {
        (path.parent / part).resolve()
        for path in EXPERIMENTS
        for part in yaml.safe_load(path.read_text()).get("include", [])
    }
    alone = ("experiment", "logger", "ablation", "prior", "sweep")
    parts = {path.resolve() for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in alone}
    assert parts == used - set(EXPERIMENTS)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda path: path.stem)
def test_a_variant_differs_in_the_methods_options_alone(config: Path) -> None:
    base = base_of(config)
    assert base is not None
    variant, whole = load_config(config), load_config(base)
    methods = [experiment.pop("model") for experiment in (variant, whole)]
    assert variant.pop("out") == f"runs/{config.stem}" and whole.pop("out") == f"runs/{base.stem}"
    assert variant == whole and methods[0] != methods[1]
    network = build_module(methods[0], ["liver", "spleen"]).network.eval()
    assert network(torch.zeros(1, 1, 48, 40)).shape == (1, 3, 48, 40)


@pytest.mark.parametrize("config", WITH_COARSE, ids=lambda path: path.stem)
def test_what_goes_on_from_a_coarse_model_names_one_of_the_same_data(config: Path) -> None:
    whole = load_config(config)
    coarse = coarse_of(config)
    assert coarse in ROUND0
    before = load_config(coarse)
    assert whole["model"]["init_args"]["coarse"] == f"{before['out']}/checkpoints/last.ckpt"
    assert whole["data"] == before["data"] and whole["seed"] == before["seed"]
    network = build_module(whole["model"], ["liver", "spleen"]).network
    other = build_module(before["model"], ["liver", "spleen"]).network
    assert [value.shape for value in network.state_dict().values()] == [v.shape for v in other.state_dict().values()]
    rounds = config.stem.endswith("_stipple")
    assert rounds == bool(whole.get("curriculum"))
    plain = load_config(config.with_name(f"{config.stem.replace('inerrant_', '')}0.yaml")) if rounds else whole
    steps = whole["trainer"]["max_steps"] + (whole["curriculum"]["round_steps"] if rounds else 0)
    assert steps == plain["trainer"]["max_steps"], "with and without relabelling, the same number of steps"


ABLATIONS: dict[str, dict[str, Any]] = {
    "finest_skip": {"gates": 4, "keys": {64}},
    "heads_1": {"gates": 0, "heads": {1}, "keys": set()},
    "heads_2": {"gates": 0, "heads": {2}, "keys": set()},
    "heads_4": {"gates": 0, "heads": {4}, "keys": set()},
    "mhca_level_1": {"bottom": "Identity", "gates": 1},
    "mhca_level_1_without_positions": {"bottom": "Identity", "gates": 1, "positions": {False}},
    "mhca_without_positions": {"bottom": "Identity", "positions": {False}},
    "mhsa_without_positions": {"gates": 0, "positions": {False}, "keys": set()},
    "nnunet": {"backbone": "NNUNet", "blocks": [1] * 5},
    "qk_norm": {"normed": {True}},
    "rotary": {"positions": {"rotary"}},
    "residual_encoder": {"backbone": "NNUNet", "blocks": [1, 3, 4, 6, 6]},
    "transformer_block": {"bottom": "TransformerBlock"},
}
"""What each of them changes of btcv_100_utransformer."""


def described(network: Any) -> dict[str, Any]:
    """Its parts and their options."""
    attention = [
        part for part in network.modules() if isinstance(part, MultiHeadSelfAttention | MultiHeadCrossAttention)
    ]
    gates = [gate for gate in network.backbone.gates if isinstance(gate, MultiHeadCrossAttention)]
    return {
        "backbone": type(network.backbone).__name__,
        "blocks": [len(block) for block in network.backbone.encoder],
        "bottom": type(network.backbone.bottom).__name__,
        "gates": len(gates),
        "heads": {part.heads for part in attention},
        "positions": {part.positional_encoding for part in attention},
        "keys": {gate.keys for gate in gates},
        "normed": {part.qk_norm is not None for part in attention},
    }


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("ablation/*.yaml")))
def test_every_ablation_is_another_network(name: str) -> None:
    whole = load_config(CONFIGS / "experiment" / "btcv_100_utransformer.yaml")
    names = ["nnunet", name] if name == "residual_encoder" else [name]
    ablated = functools.reduce(merge, (load_config(CONFIGS / "ablation" / f"{name}.yaml") for name in names), whole)
    networks = [build_module(config["model"], ["liver", "spleen"]).network.eval() for config in (whole, ablated)]
    assert described(networks[1]) == {**described(networks[0]), **ABLATIONS[name]}
    assert networks[1](torch.zeros(1, 1, 48, 40)).shape == (1, 3, 48, 40)


@pytest.mark.parametrize("name", ["mhsa", "mhca", "unet"])
def test_each_attention_of_table_5_6_goes_on_nnunet(name: str) -> None:
    whole = load_config(CONFIGS / "experiment" / f"btcv_100_{name}.yaml")
    other = merge(whole, load_config(CONFIGS / "ablation" / "nnunet.yaml"))
    networks = [build_module(config["model"], ["liver", "spleen"]).network.eval() for config in (whole, other)]
    assert described(networks[1]) == {**described(networks[0]), **ABLATIONS["nnunet"]}
    assert networks[1](torch.zeros(1, 1, 48, 40)).shape == (1, 3, 48, 40)


def test_patches_of_the_hybrid_divide_those_of_the_data() -> None:
    whole = load_config(CONFIGS / "experiment" / "btcv3d_100_hybrid.yaml")
    network: Any = build_module(whole["model"], ["liver", "spleen"]).network
    volume = whole["data"]["init_args"]["patch_size"]
    assert [n / size for n, size in zip(volume, network.patch, strict=True)] == [2, 2, 2]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("prior/*.yaml")))
def test_every_use_of_the_prior_is_another_method(name: str) -> None:
    whole = load_config(CONFIGS / "experiment" / "btcv_30_stipple0.yaml")
    varied = merge(whole, load_config(CONFIGS / "prior" / f"{name}.yaml"))
    modules: list[Any] = [build_module(config["model"], ["liver", "spleen"]) for config in (whole, varied)]
    seen = [(one.use, one.cross_fitted, one.start, one.positioning, one.position, one.prior_checkpoint,
             one.placed_by_others, type(one.network)) for one in modules]  # fmt: skip
    assert seen[0] != seen[1]
    assert [v.shape for v in modules[0].coarse.state_dict().values()] == [
        v.shape for v in modules[1].coarse.state_dict().values()
    ]
    assert varied["model"]["init_args"]["network"]["class_path"].endswith(
        "UTransformer" if name == "utransformer" else "UNet"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("logger", "written"), [
    ("tensorboard", "runs/tensorboard/organseg/*/events*"), ("wandb", "run/wandb/offline-run-*/run-*.wandb"),
])  # fmt: skip
def test_loggers_go_beside_the_metrics_file(logger: str, written: str, toy: Path, tmp_path: Path) -> None:
    organseg("fit", "--config", CONFIGS / "experiment" / "phantom_30_inerrant0.yaml",
             "--config", CONFIGS / "logger" / f"{logger}.yaml", "--data.init_args.cache", toy / "cache",
             "--out", tmp_path / "run", "--trainer.max_steps=2", *TOY, cwd=tmp_path, cold=True)  # fmt: skip
    assert "train/loss" in (tmp_path / "run" / "metrics.csv").read_text()
    assert len(list(tmp_path.glob(written))) == 1


@pytest.mark.slow
def test_a_3d_network_does_not_train_on_slices(toy: Path, tmp_path: Path) -> None:
    done = organseg("fit", "--config", CONFIGS / "experiment" / "phantom_30_inerrant0.yaml", "--data.init_args.cache",
                    toy / "cache", "--out", tmp_path / "run", "--trainer.max_steps=2",
                    "--model.init_args.network.init_args.dims=3", *TOY, check=2)  # fmt: skip
    assert "the network has dims 3, the data module gives 2D" in done.stderr
