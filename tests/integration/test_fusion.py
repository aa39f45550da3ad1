"""Several data sets in one run (METHOD.md 1.7): organs matched by name, one data set held out, the gaps relabelled."""

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from synthetic import LABELS, SHAPE, make_cache, make_case, write_dataset
from toy import TOY, organseg

from organseg.data.folds import split
from organseg.data.manifest import load_manifest
from organseg.data.pseudo_labels import read_pseudo_labels, read_round_header

ROOT = Path(__file__).parents[2]
ORGANS = ("liver", "left_kidney", "right_kidney", "spleen")
FULL = {4: "Kidney left", 1: "lien", 2: "kidney_right", 9: "Liver"}
"""Other integers and names than those of `single` and `held`."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`full` labels all organs, `single` the liver alone; `held` and `other` can be tested."""
    folder = tmp_path_factory.mktemp("fusion")
    sets = {"full": (4, 0, FULL), "single": (5, 20, {3: "hepar"}), "held": (2, 40, LABELS), "other": (2, 60, LABELS)}
    for name, (cases, seed, labels) in sets.items():
        make_cache(write_dataset(folder / name, cases, name=name, seed=seed, labels=labels), folder / "cache")
    return folder / "cache"


def command(cache: Path, run: Path, experiment: str, *more: object) -> list[object]:
    return ["fit", "--config", ROOT / "configs" / "experiment" / f"{experiment}.yaml", "--out", run, *TOY,
            "--data.init_args.cache", cache, "--data.init_args.datasets=[full, single]",
            f"--data.init_args.organs=[{', '.join(ORGANS)}]", *more]  # fmt: skip


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with one round, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    words = command(cache, folder, "fusion_inerrant", "--data.init_args.test_datasets=[held]", "--curriculum.score=mcp",
                    "--curriculum.rounds=1", "--curriculum.round_steps=2", "--trainer.max_steps=60")  # fmt: skip
    return folder, organseg(*words).stdout


@pytest.mark.slow
def test_who_labels_what_is_shown_once_and_before_the_training(run: tuple[Path, str]) -> None:
    lines = run[1].splitlines()
    assert lines.count("organ          annotated in, of 9 training cases") == 1
    assert lines[:4] == [
        "data set        training  validation        test  cases; labels",
        "full                   4           0           0  liver, left_kidney, right_kidney, spleen",
        "held                   0           0           2  liver, left_kidney, right_kidney, spleen",
        "single                 5           0           0  liver",
    ]
    assert "liver                  9  (4 of 4 in full, 5 of 5 in single)" in lines
    assert "spleen                 4  (4 of 4 in full, 0 of 5 in single)" in lines


@pytest.mark.slow
def test_only_what_a_data_set_does_not_label_is_relabelled(run: tuple[Path, str]) -> None:
    labels = run[0] / "pseudo_labels" / "round_1"
    keys = [str(path.relative_to(labels).with_suffix("")) for path in sorted(labels.rglob("*.h5"))]
    assert keys == [f"single/case{i}" for i in range(5)]
    headers = [read_round_header(labels, key) for key in keys]
    assert all(header.organs == ORGANS for header in headers)
    candidates = np.sum([header.candidates for header in headers], axis=0)
    assert candidates[0] == 0 and candidates[1:].sum() > 0
    liver = next(value for value, organ in LABELS.items() if organ == "liver")
    for i, key in enumerate(keys):
        added = read_pseudo_labels(labels, key).label
        assert not added[make_case(20 + i)[1] == liver].any()  # annotated there


@pytest.mark.slow
def test_the_held_out_cases_are_scored_and_no_others(cache: Path, run: tuple[Path, str]) -> None:
    config, last = run[0] / "config.yaml", run[0] / "checkpoints" / "last.ckpt"
    organseg("test", "--config", config, "--ckpt_path", last)
    with (run[0] / "test" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {"held/case0", "held/case1"}
    assert sorted({row["organ"] for row in rows}) == sorted(ORGANS) and len(rows) == 8
    for other in ("[other]", "null"):  # others were trained on, or could have been
        done = organseg("test", "--config", config, "--ckpt_path", last,
                        f"--data.init_args.test_datasets={other}", check=4)  # fmt: skip
        assert "data.test_datasets: trained with ['held'], asked for" in done.stderr


@pytest.mark.slow
def test_the_round_can_be_laid_over_the_scans(run: tuple[Path, str], tmp_path: Path) -> None:
    organseg("export", run[0], "--out", tmp_path, "--merged")
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert tuple(labels.values()) == ORGANS
    merged = nibabel.load(tmp_path / "single" / "case0_merged.nii.gz")
    assert merged.shape == SHAPE[::-1]
    liver = next(value for value, organ in LABELS.items() if organ == "liver")
    assert (np.asarray(merged.dataobj).T[:, ::-1, ::-1][make_case(20)[1] == liver] == 1).all()


@pytest.mark.slow
def test_weights_do_not_depend_on_what_is_held_out(cache: Path, tmp_path: Path) -> None:
    digests = set()
    for held in ("held", "other"):
        folder = tmp_path / held
        tested = f"--data.init_args.test_datasets=[{held}]"
        organseg(*command(cache, folder, "fusion_inerrant0", tested, "--trainer.max_steps=3"))
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        digests.add(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest())
    assert len(digests) == 1


def fusion(dataset: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, ROOT / "tools" / "fusion.py", dataset, "--out", out, *more]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)


def test_the_tool_divides_a_data_set_and_hides_all_but_the_pancreas(tmp_path: Path) -> None:
    labels = {**LABELS, 9: "pancreas"}
    entries = {"case3": {"patient": "p"}, "case4": {"patient": "p"}, "case5": {"annotated": ["liver", "pancreas"]}}
    hidden = {"case5": {**entries["case5"], "hide": ["spleen", "left_kidney", "right_kidney"]}}
    dataset = write_dataset(tmp_path / "set", 12, name="btcv", labels=labels, entries={**entries, **hidden})
    done = fusion(dataset, tmp_path / "out", "--cases", "3")
    assert done.returncode == 0, done.stderr
    few, one, held = (load_manifest(tmp_path / "out" / f"{part}.yaml") for part in ("few", "pancreas", "heldout"))
    assert [manifest.name for manifest in (few, one, held)] == ["btcv_few", "btcv_pancreas", "btcv_heldout"]
    ids = [[case.id for case in manifest.cases] for manifest in (few, one, held)]
    assert sorted(name for part in ids for name in part) == sorted(f"case{i}" for i in range(12))
    patients = {f"btcv/case{i}": f"btcv/case{i}" for i in range(12)} | {"btcv/case3": "p", "btcv/case4": "p"}
    assert [f"btcv/{name}" for name in ids[2]] == sorted(split(patients, fold=0).test, key=lambda key: int(key[9:]))
    assert len({patients[f"btcv/{name}"] for name in ids[0]}) == 3 and "case5" not in ids[0]
    assert sum({"case3", "case4"} <= set(part) for part in ids) == 1
    assert all(case.annotated == set(labels.values()) and not case.hidden for case in few.cases)
    assert all(case.annotated == {"pancreas"} and case.hidden == set(LABELS.values()) for case in one.cases)
    assert fusion(dataset, tmp_path / "again", "--cases", "3").stdout == done.stdout.replace("/out/", "/again/")
    other = fusion(dataset, tmp_path / "other", "--cases", "3", "--seed", "1").stdout.splitlines()
    assert other[2].split(":")[1:] == done.stdout.splitlines()[2].split(":")[1:]
    assert other[0].split(":")[1:] != done.stdout.splitlines()[0].split(":")[1:]


def test_the_tool_says_what_it_cannot_do(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", 6, name="btcv", labels={**LABELS, 9: "pancreas"})
    done = fusion(dataset, tmp_path / "out", "--cases", "5")
    assert done.returncode and "--cases 5:" in done.stderr and not (tmp_path / "out").exists()
    done = fusion(write_dataset(tmp_path / "without", 6), tmp_path / "out")
    assert done.returncode and "does not label the pancreas" in done.stderr
