"""`organseg export`: pseudo-labels lie in the world where the source file's organs lie, and nothing is replaced."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation
from synthetic import LABELS, make_cache, make_case, write_dataset, write_label_map, write_scan

from organseg.cli import run
from organseg.curriculum.journal import Entry, Journal, digest_of
from organseg.data.cohort import CohortOptions, load_cohort
from organseg.data.pseudo_labels import (
    PSEUDO_LABELS,
    PseudoLabels,
    RoundHeader,
    merge,
    path_of,
    read_pseudo_labels,
    write_pseudo_labels,
)
from organseg.data.sealed import verify_sealed
from organseg.runtime.run_folder import DATA
from organseg.volumes import WorkingGrid

OPTIONS = {"datasets": ["tiny"], "organs": ["spleen", "liver", "left_kidney", "right_kidney"], "fold": 0, "folds": 5,
           "fold_seed": 0, "val_share": 0.0, "label_share": 0.5}  # fmt: skip
GRIDS = {"size": WorkingGrid(size=24), "spacing": WorkingGrid(spacing=(6.0, 11.0, 13.0)), "own": WorkingGrid()}


def affine_of(code: str) -> np.ndarray:
    """A file's affine from its axis codes; `~` turns it by some degrees."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, letter in enumerate(code.rstrip("~")):
        world = next(i for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        affine[world, axis] = (8.0, 9.0, 10.0)[world] * (1 if letter in "RAS" else -1)
    if code.endswith("~"):
        affine[:3, :3] = Rotation.from_euler("xyz", (12, -9, 20), degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = (31, -17, 523)
    return affine


def make_run(folder: Path, code: str = "LAS", grid: str = "size", rounds: int = 2) -> tuple[Path, Path]:
    """A data set in that voxel order, and a run whose pseudo-labels are exactly what `label_share` hides.

    Round t adds the hidden organs' voxels in even slices at t = 1, all at t = 2.
    """
    dataset = write_dataset(folder / "set", 6)
    for i in range(6):
        image, label = make_case(i)
        write_scan(dataset.parent / f"case{i}.nii.gz", image, affine_of(code))
        write_label_map(dataset.parent / f"case{i}_label.nii.gz", label, affine_of(code))
    cache, home = make_cache(dataset, folder / "cache", GRIDS[grid]), folder / "run"
    cohort = load_cohort(CohortOptions(cache, seed=3, **OPTIONS))
    identity = {"seed": 3, DATA: cohort.content_hash}
    journal = Journal(home, lambda path: verify_sealed(path, PSEUDO_LABELS))
    home.mkdir()
    entry = Entry("00_round0_train", digest_of(identity), {})
    journal.append(entry)
    for t in range(1, rounds + 1):
        outputs = {}
        for case in cohort.train:
            if case.known.all():
                continue
            label = case.cached.arrays().label
            table = np.array([0, *(cohort.organs.index(organ) + 1 for organ in case.cached.header.organs)], np.uint8)
            hidden = np.where(case.lookup[label] == 0, table[label], 0).astype(np.uint8)
            added = hidden if t == 2 else np.where(np.arange(len(label))[:, None, None] % 2 == 0, hidden, 0)
            scores = (hidden > 0) * np.float32(0.75)
            round_of = (added > 0).astype(np.uint8) * t
            round_of[(added > 0) & (np.arange(len(label))[:, None, None] % 2 == 0)] = 1
            parts = (0,) * len(cohort.organs)
            header = RoundHeader(case.key, cohort.organs, t, t / 2, entry.digest, parts, parts)
            voxels = PseudoLabels(added.astype(np.uint8), round_of, hidden, scores, scores)
            path = home / f"pseudo_labels/round_{t}"
            write_pseudo_labels(path, header, voxels)
            outputs[f"pseudo_labels/round_{t}/{case.key}.h5"] = verify_sealed(path_of(path, case.key), PSEUDO_LABELS)
        for phase, files in ((f"{3 * t - 1:02d}_round{t}_relabel", outputs), (f"{3 * t:02d}_round{t}_train", {})):
            entry = Entry(phase, entry.digest, files)
            journal.append(entry)
    data = {"class_path": "organseg.data.SliceDataModule", "init_args": {**OPTIONS, "cache": str(cache), "workers": 0}}
    (home / "config.yaml").write_text(yaml.safe_dump({"seed": 3, "data": data}))
    (home / "run.json").write_text(json.dumps({"finished": True, "identity": identity}))
    return home, cache


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    return make_run(tmp_path_factory.mktemp("made"))


def export(home: Path, out: Path, *more: str) -> int:
    return run(["export", str(home), "--out", str(out), *more])


def world_centres(path: Path, values: dict[str, int]) -> dict[str, np.ndarray]:
    """Centroid of each organ in a file, world RAS mm, as nibabel sees it."""
    image = nibabel.load(path)
    label = np.asarray(image.dataobj)
    return {
        organ: nibabel.affines.apply_affine(image.affine, np.argwhere(label == value)).mean(0)
        for organ, value in values.items()
        if (label == value).any()
    }


@pytest.mark.parametrize(
    ("code", "grid"),
    [("LAS", "size"), ("RAS", "size"), ("LPS", "spacing"), ("PIR", "size"), ("SAL", "spacing"), ("IPL", "size"),
     ("LAS~", "size"), ("PSR~", "spacing"), ("LAS", "own")],
)  # fmt: skip
def test_organs_lie_in_the_world_where_the_source_has_them(tmp_path, code, grid):
    home, _ = make_run(tmp_path, code, grid)
    assert export(home, tmp_path / "out") == 0
    values = {organ: int(value) for value, organ in json.loads((tmp_path / "out" / "labels.json").read_text()).items()}
    seen, sides = set(), 0
    for path in sorted((tmp_path / "out" / "tiny").glob("*_label.nii.gz")):
        exported = nibabel.load(path)
        assert nibabel.aff2axcodes(exported.affine) == nibabel.aff2axcodes(affine_of(code))
        found = world_centres(path, values)
        source = world_centres(
            tmp_path / "set" / path.name,
            {organ: value for value, organ in LABELS.items()},
        )
        for organ, centre in found.items():
            apart = np.linalg.norm(centre - source[organ])
            assert apart < (1e-9 if grid == "own" else 0.5 * min(exported.header.get_zooms())), organ
        seen |= set(found)
        if {"left_kidney", "right_kidney"} <= set(found) and not code.endswith("~"):
            assert found["left_kidney"][0] < found["right_kidney"][0]  # x grows to the right in RAS
            sides += 1
    assert seen == set(values)
    assert sides or code.endswith("~")


def test_the_voxels_are_those_of_the_round(made, tmp_path):
    home, cache = made
    assert export(home, tmp_path / "out", "--merged") == 0
    cohort = load_cohort(CohortOptions(cache, seed=3, **OPTIONS))
    relabelled = [case for case in cohort.train if not case.known.all()]
    names = {f"{case.key}_{part}.nii.gz" for case in relabelled for part in ("label", "round", "score", "merged")}
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == names | {"labels.json"}
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {
        str(k): organ for k, organ in enumerate(cohort.organs, start=1)
    }
    for case in relabelled:
        voxels = read_pseudo_labels(home / "pseudo_labels" / "round_2", case.key)
        maps = {"label": voxels.label, "round": voxels.round, "score": voxels.score}
        maps["merged"] = merge(case.lookup[case.cached.arrays().label], voxels.label)
        for part, expected in maps.items():
            image = nibabel.load(tmp_path / "out" / f"{case.key}_{part}.nii.gz")
            array = np.asarray(image.dataobj)  # LAS: canonical but for y, in x, y, z
            assert (array.T[:, ::-1] == expected).all()
            assert image.get_data_dtype() == expected.dtype
        assert set(np.unique(voxels.round)) == {0, 1, 2}
        assert (maps["merged"][case.cached.arrays().label > 0] > 0).all()


def test_any_finished_round_can_be_asked_for(made, tmp_path, capsys):
    home, _ = made
    assert export(home, tmp_path / "one", "--round", "1") == 0
    assert "round 1, pseudo-labels of" in capsys.readouterr().out
    rounds = np.asarray(nibabel.load(next((tmp_path / "one").rglob("*_round.nii.gz"))).dataobj)
    assert set(np.unique(rounds)) == {0, 1}
    for wanted in ("0", "3", "-1"):
        assert export(home, tmp_path / "other", "--round", wanted) == 2
        assert f"--round {wanted}: not finished in {home}; finished: 1, 2" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_round_that_is_not_in_the_journal_is_none(tmp_path, capsys):
    home, _ = make_run(tmp_path)
    lines = (home / "journal.jsonl").read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if "05_round2_relabel" in line)
    (home / "journal.jsonl").write_text("\n".join(lines[:place]) + "\n" + lines[place][:40])  # torn
    assert export(home, tmp_path / "out") == 0
    assert "round 1, " in capsys.readouterr().out
    (home / "journal.jsonl").unlink()
    assert export(home, tmp_path / "none") == 2
    assert "no relabelling round is finished" in capsys.readouterr().err


def test_existing_outputs_are_refused_and_nothing_is_written(made, tmp_path, capsys):
    home, _ = made
    first = next((home / "pseudo_labels" / "round_2" / "tiny").glob("*.h5")).stem
    mine = tmp_path / "tiny" / f"{first}_score.nii.gz"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    assert export(home, tmp_path) == 2
    assert f"{mine}: exists" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert export(home, tmp_path, "--overwrite") == 0
    assert mine.read_bytes() != b"mine"
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize("damage", ["flip", "gone", "other"])
def test_a_damaged_case_is_told_and_the_others_are_written(tmp_path, capsys, damage):
    home, _ = make_run(tmp_path)
    files = sorted((home / "pseudo_labels" / "round_2" / "tiny").glob("*.h5"))
    bad, *good = files
    if damage == "flip":
        content = bytearray(bad.read_bytes())
        content[-9] ^= 1
        bad.write_bytes(content)
    elif damage == "gone":
        bad.unlink()
    else:  # undamaged, but of another round
        bad.write_bytes((home / "pseudo_labels" / "round_1" / "tiny" / bad.name).read_bytes())
    assert export(home, tmp_path / "out") == 4
    shown = capsys.readouterr()
    assert f"tiny/{bad.stem}" in shown.err and len(shown.err.splitlines()) == 1
    assert f"pseudo-labels of {len(good)} cases written, 1 damaged" in shown.out
    written = {path.name for path in (tmp_path / "out" / "tiny").iterdir()}
    assert written == {f"{path.stem}_{part}.nii.gz" for path in good for part in ("label", "round", "score")}


def test_another_cache_is_refused_and_a_moved_one_can_be_named(tmp_path, capsys):
    home, cache = make_run(tmp_path)
    moved = cache.rename(tmp_path / "moved")
    assert export(home, tmp_path / "out") == 2
    assert "no prepared data set here" in capsys.readouterr().err
    assert export(home, tmp_path / "out", "--cache", str(moved)) == 0
    make_cache(tmp_path / "set" / "dataset.yaml", tmp_path / "finer", WorkingGrid())
    assert export(home, tmp_path / "again", "--cache", str(tmp_path / "finer")) == 4
    assert "other cases, annotations or grids" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_what_is_no_run(tmp_path, capsys):
    assert export(tmp_path / "gone", tmp_path / "out") == 2
    assert "no run here" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert export(tmp_path, tmp_path / "out") == 2
    assert "but no run" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made(made, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert export(made[0], tmp_path / "file" / "out") == 5
    assert "cannot be made" in capsys.readouterr().err
