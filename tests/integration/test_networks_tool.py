"""`tools/networks.py`: what is finished is not done again, and ends in tables and paired tests of equal runs."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import warm
from toy import TOY

from organseg.cli.configs import load_config
from organseg.cli.modules import build_module
from organseg.errors import IntegrityError
from organseg.metrics.statistics import compare_paired, holm

sys.path.append(str(warm.TOOLS))

import compared
import networks
import paired


def begun(folder: Path, **identity: object) -> Path:
    """A run that has begun: `a__b` is the key `a.b`."""
    folder.mkdir(parents=True)
    named = {key.replace("__", "."): value for key, value in identity.items()}
    (folder / "run.json").write_text(json.dumps({"finished": True, "identity": named}))
    return folder


def test_unequal_runs_are_refused_with_run_key_and_both_values(tmp_path: Path) -> None:
    one = begun(tmp_path / "one", seed=0, model__width=4, trainer__max_steps=3, data__fold=0)
    same = begun(tmp_path / "same", seed=1, model__width=8, trainer__max_steps=3, data__fold=0)
    compared.refuse_unequal([], ())
    compared.refuse_unequal([one, tmp_path / "not begun", same], ("model.", "seed"))
    with pytest.raises(IntegrityError, match=r"seed: 0 there, 1 here$"):
        compared.refuse_unequal([one, same], ("model.",))
    other = begun(tmp_path / "other", seed=0, model__width=4, trainer__max_steps=4)
    with pytest.raises(IntegrityError) as refused:
        compared.refuse_unequal([tmp_path / "not begun", one, same, other], ("model.", "seed"))
    said, *differences = str(refused.value).splitlines()
    assert said.startswith(f"{other}: cannot be compared with {one}:") and "another --out" in said
    assert [line.strip() for line in differences] == [
        "data.fold: 0 there, nothing here",
        "trainer.max_steps: 3 there, 4 here",
    ]


def test_methods_are_compared_after_equal_steps(tmp_path: Path) -> None:
    round0 = begun(tmp_path / "round0", trainer__max_steps=1500)
    rounds = {"curriculum__rounds": 2, "curriculum__round_steps": 600}
    runs = [
        round0,
        begun(tmp_path / "inerrant0", trainer__max_steps=2700),
        begun(tmp_path / "inerrant", trainer__max_steps=1500, **rounds),
        begun(
            tmp_path / "stipple0", trainer__max_steps=1200, model__init_args__coarse=f"{round0}/checkpoints/last.ckpt"
        ),
    ]
    compared.refuse_unequal_methods(runs, round0)
    short = begun(tmp_path / "short", trainer__max_steps=1200, **rounds)
    with pytest.raises(IntegrityError, match=rf"(?s)equally many optimiser steps.*{short}: 2400"):
        compared.refuse_unequal_methods([*runs, short], round0)
    longer = begun(tmp_path / "longer", trainer__max_steps=1300, model__init_args__coarse=f"{round0}/a/last.ckpt")
    with pytest.raises(IntegrityError, match=rf"(?s)equally many optimiser steps.*{longer}: 2800"):
        compared.refuse_unequal_methods([*runs, longer], round0)
    gone = begun(tmp_path / "gone", trainer__max_steps=1300, model__init_args__coarse=f"{tmp_path}/no/a/last.ckpt")
    compared.refuse_unequal_methods([*runs, gone], round0)  # nobody knows any more how long that was
    coarse = begun(tmp_path / "coarse", trainer__max_steps=2700, data__fold=1)
    with pytest.raises(IntegrityError, match=r"data.fold: nothing there, 1 here"):
        compared.refuse_unequal_methods([*runs, coarse], round0)


@pytest.mark.parametrize("prefix", ["btcv_100", "mirrored_100"])
def test_the_shipped_networks_differ_in_the_model_only(prefix: str) -> None:
    configs = [load_config(networks.CONFIGS / f"{prefix}_{network}.yaml") for network in networks.NETWORKS]
    others = [{key: part for key, part in config.items() if key not in ("model", "out")} for config in configs]
    assert all(one == other for one, other in pairwise(others))


@pytest.mark.parametrize("prefix", ["btcv_100", "mirrored_100"])
def test_the_shipped_networks_have_the_same_convolutions_and_norms(prefix: str) -> None:
    """Attention comes on top: another backbone drops the options that this is said by."""
    shapes = {}
    for network in networks.NETWORKS:
        config = load_config(networks.CONFIGS / f"{prefix}_{network}.yaml")
        state = build_module(config["model"], ["liver"]).network.state_dict()
        shapes[network] = Counter(tuple(value.shape) for value in state.values())
    for network in networks.NETWORKS[1:]:
        missing = shapes["unet"] - shapes[network]
        assert not missing, network


def test_tests_over_cases_for_each_organ(capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds of which one is common, and an organ that a case does not know."""
    a, b, c = "abc"
    liver, spleen = {a: 0.5, b: 0.5, c: 0.5}, {a: 0.1, b: 0.3}

    def known(more: float, spread: float) -> dict[tuple[str, str], float]:
        of_liver = {("liver", case): value + more + spread * i for i, (case, value) in enumerate(liver.items())}
        return {**of_liver, **{("spleen", case): value for case, value in spleen.items()}}

    found = {
        "unet": {0: known(0, 0), 1: known(0.4, 0)},
        "near": {0: known(0.1, 0.01)},
        "far": {0: known(0.2, 0.02)},
    }
    lines = {name: (one, p) for name, one, p in paired.tests_of(found, "liver")}
    near, far = compare_paired([0.6, 0.61, 0.62], [0.5] * 3), compare_paired([0.7, 0.72, 0.74], [0.5] * 3)
    assert lines["near"][0].mean_difference == pytest.approx(0.11) and lines["near"][0].cases == 3
    t_tests, wilcoxons = zip(*(lines[name][1] for name in ("near", "far")), strict=True)
    assert t_tests == pytest.approx(holm([near.t_test_p, far.t_test_p]))
    assert wilcoxons == pytest.approx(holm([near.wilcoxon_p, far.wilcoxon_p]))
    ((_, one, (_, p)), _) = paired.tests_of(found, "spleen")
    assert (one.cases, one.mean_difference, p) == (2, 0, 1)
    paired.show_tests(found)
    shown = capsys.readouterr().out
    assert "near: +7.5 (95% " in shown  # over the organs that a case knows: 5 in a, 5.5 in b, and 12 in c
    assert f"| liver | near | 3 | +11.0 | {100 * near.low:+.1f} to {100 * near.high:+.1f} | " in shown
    assert "| spleen | far | 2 | +0.0 | +0.0 to +0.0 | 1 | 1 |" in shown
    assert "3 cases cannot give less than 0.5" in shown  # twice 2 / 2 ** 3


def test_only_organs_that_both_have_are_compared() -> None:
    ours = {(organ, case): value for case in "ab" for organ, value in (("liver", 0.9), ("pancreas", 0.3))}
    theirs = {("liver", case): 0.8 for case in "ab"}
    ((_, one, _),) = paired.tests_of({"ours": {0: ours}, "theirs": {0: theirs}}, None)
    assert one.cases == 2 and one.mean_difference == pytest.approx(-0.1)


OLD, LINE = "network,seed,organ,case,dsc\nunet,0,liver,a,0.5\n", "unet,0,32-true,liver,a,found,0.5"


@pytest.mark.parametrize(
    "content",
    [OLD, ",".join(networks.COLUMNS) + f"\n{LINE}\nunet,0,32-true,liv", ",".join(networks.COLUMNS) + f"\n{LINE}x\n",
     ",".join(networks.COLUMNS) + f"\n{LINE},more\n", b"\xff\xfe\x00"],
    ids=["of another version", "truncated", "no number", "too long", "no text"],
)  # fmt: skip
def test_a_broken_table_is_refused_by_name(tmp_path: Path, content: str | bytes) -> None:
    table = tmp_path / "btcv_100.csv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(IntegrityError, match=r"btcv_100\.csv.*move it away"):
        networks.known_lines(table)
    table.write_text("")
    assert networks.known_lines(table) == networks.known_lines(tmp_path / "none.csv") == []


@pytest.mark.slow
def test_two_networks_are_compared(toy: Path, tmp_path: Path) -> None:
    words = ("--cache", toy / "cache", "--out", tmp_path, "--prefix", "mirrored_100", "--networks", "unet", "mhsa")

    def run(*more: str, check: int = 0) -> subprocess.CompletedProcess[str]:
        done = warm.run_tool("networks", *words, *more)
        assert done.returncode == check, done.stderr
        return done

    # Half of the five patients are held out, so that there is something to compare.
    options = (*TOY, "--trainer.max_steps=3", "--data.init_args.folds=2")
    run(*options)
    shown = run(*options).stdout
    assert "$ organseg" not in shown
    assert "| unet | 1 |" in shown and "| mhsa | 1 |" in shown
    assert "mhsa: " in shown and "Holm's correction over the 1 others" in shown
    assert "| spleen | mhsa | " in shown
    assert run("--minutes", "0").stdout == shown
    table = tmp_path / "mirrored_100.csv"
    assert table.read_text().startswith("network,seed,computed_in,organ,case,outcome,dsc\nunet,0,")
    refused = run(*options, "--trainer.max_steps=4", check=4).stderr  # what is there was made otherwise
    assert "trainer.max_steps: run has 3, asked for 4" in refused and "Traceback" not in refused
    record = tmp_path / "mirrored_100" / "seed0" / "mhsa" / "run.json"
    record.write_text(record.read_text().replace('"trainer.max_steps": 3', '"trainer.max_steps": 30'))
    refused = run("--minutes", "0", check=4).stderr
    assert "trainer.max_steps: 3 there, 30 here" in refused and str(record.parent) in refused
    shutil.rmtree(tmp_path / "mirrored_100")  # the table keeps what it knows
    assert run("--minutes", "0").stdout == shown
    assert "| mhsa | " not in run("--minutes", "0", "--networks", "unet").stdout
    table.write_text(table.read_text().replace("mhsa,0,", "mhsa,0,another-"))
    refused = run("--minutes", "0", check=4).stderr
    assert re.search(r"was computed in (another-|32-true and another-)", refused) and str(table) in refused
