"""`organseg evaluate`: other people's label maps in the same table as our own."""

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from synthetic import AFFINE, LABELS, make_case, write_dataset, write_label_map

from organseg.cli import run

INTEGERS = [f"{value}={organ}" for value, organ in LABELS.items()]


@pytest.fixture
def dataset(tmp_path) -> Path:
    path = write_dataset(tmp_path / "set", 3, entries={"case1": {"annotated": ["liver"]}})
    label = make_case(1)[1]
    write_label_map(path.parent / "case1_label.nii.gz", np.where(label == 2, label, 0).astype(np.uint8))
    return path


def scores(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "cases.csv").open() as file:
        return {(row["case"], row["organ"]): row for row in csv.DictReader(file)}


def evaluate(dataset: Path, folder: Path, *more: str) -> int:
    words = [
        "evaluate",
        str(dataset),
        "--predictions",
        str(folder),
        "--out",
        str(folder / "scores"),
        "--processes",
        "1",
    ]
    return run([*words, *more])


def test_scores_by_hand_of_maps_with_the_data_set_s_integers(dataset, tmp_path, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    first, second = make_case(0)[1], make_case(1)[1]
    moved = np.roll(first, 1, axis=1)
    write_label_map(folder / "case0.nii.gz", moved)
    write_label_map(folder / "case1.nii.gz", second)
    assert evaluate(dataset, folder) == 0
    captured = capsys.readouterr()
    assert "1 of 3 cases have no prediction" in captured.err
    assert "both empty (annotated, absent, and not predicted)" in captured.out
    found = scores(folder / "scores")
    assert {case for case, _ in found} == {"tiny/case0", "tiny/case1"}
    for value, organ in LABELS.items():
        one, two = moved == value, first == value
        expected = 2 * (one & two).sum() / (one.sum() + two.sum())
        assert float(found["tiny/case0", organ]["dsc"]) == pytest.approx(expected)
    assert float(found["tiny/case0", "liver"]["hd_mm"]) == pytest.approx(9)  # one voxel along y
    outcomes = {organ: found["tiny/case1", organ]["outcome"] for organ in LABELS.values()}
    assert outcomes == {"liver": "found", "left_kidney": "unknown", "right_kidney": "unknown", "spleen": "unknown"}
    assert found["tiny/case1", "liver"]["dsc"] == "1.0"


@pytest.mark.parametrize("says", ["option", "file", "nnU-Net"])
def test_integers_and_organs_of_their_own(dataset, tmp_path, says, capsys):
    folder = tmp_path / "theirs"
    (folder / "tiny").mkdir(parents=True)
    theirs = np.zeros(256, np.uint8)
    theirs[[7, 2, 5]] = 1, 2, 9  # 9: a structure that we have no name for
    for case in (0, 2):  # as `organseg test` names them
        write_label_map(folder / "tiny" / f"case{case}.nii.gz", theirs[make_case(case)[1]])
    if says == "file":
        named = {0: "background", 1: "Spleen", 2: "hepar", 3: "aorta", 9: "vertebrae_L5"}
        (folder / "labels.json").write_text(json.dumps(named))
        assert evaluate(dataset, folder) == 0
    elif says == "nnU-Net":
        (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "spleen": 1, "liver": 2}}))
        assert evaluate(dataset, folder) == 0
    else:
        assert evaluate(dataset, folder, "--labels", "1=spleen", "2=liver", "9=background") == 0
    if says == "file":
        assert "3 (aorta), 9 (vertebrae_L5): background here" in capsys.readouterr().err
    found = scores(folder / "scores")
    assert {organ for _, organ in found} == {"spleen", "liver"}, "what they do not know is no miss"
    assert {row["dsc"] for row in found.values()} == {"1.0"}


@pytest.mark.parametrize(
    "labels", ['{"liver": 2, "spleen": 2}', '{"liver": -1}', "{}", '{"background": 0}', '{"whole": [1, 2]}']
)
def test_a_dataset_json_that_does_not_say_what_an_integer_is(dataset, tmp_path, capsys, labels):
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_label_map(folder / "case0.nii.gz", make_case(0)[1])
    (folder / "dataset.json").write_text(f'{{"labels": {labels}}}')
    assert evaluate(dataset, folder) == 2
    assert "dataset.json: " in capsys.readouterr().err and not (folder / "scores").exists()


def test_what_cannot_be_scored_is_refused_and_the_rest_is_done(dataset, tmp_path, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_label_map(folder / "case0.nii.gz", make_case(0)[1])
    flipped = AFFINE.copy()
    flipped[0, 0] *= -1  # with the image's origin
    write_label_map(folder / "case1.nii.gz", make_case(1)[1], flipped)
    strange = make_case(2)[1]
    strange[0, 0, :2] = 9
    write_label_map(folder / "case2.nii.gz", strange)
    assert evaluate(dataset, folder) == 3
    _, *err = capsys.readouterr().err.splitlines()  # after whose integers they are
    assert err[0].startswith("refused: case1: case1.nii.gz: affine")
    assert err[1].startswith("refused: case2: case2.nii.gz: label values: found 9, expected 0 or one of 2, 3, 5, 7")
    assert {case for case, _ in scores(folder / "scores")} == {"tiny/case0"}


def test_nothing_to_score(dataset, tmp_path, capsys):
    folder = tmp_path / "theirs"
    assert evaluate(dataset, folder) == 2
    assert "no such folder" in capsys.readouterr().err
    folder.mkdir()
    assert evaluate(dataset, folder) == 2
    assert f"expected, for case2, {folder / 'tiny' / 'case2.nii.gz'}" in capsys.readouterr().err
    assert evaluate(dataset, folder, "--labels", "1=aorta") == 2
    assert "no organ in common" in capsys.readouterr().err
    assert not (folder / "scores").exists()


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[]", '"x"', "NaN", '{"a": "liver"}', '{"\u00b2": "liver"}', '{"02": "liver"}', '{"256": "liver"}',
     '{"2": "liver", "2": "spleen"}', "[" * 10_000, '{"1": null}', "{" + '"1": "x",' * 200_000 + "}"],
)  # fmt: skip
def test_meanings_that_are_none(dataset, tmp_path, capsys, text):
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_label_map(folder / "case0.nii.gz", make_case(0)[1])
    (folder / "labels.json").write_text(text)
    assert evaluate(dataset, folder) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (folder / "scores").exists()


def test_the_truth_itself_is_perfect_in_any_number_of_processes(dataset, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for case in range(3):  # under the image's name, as `predict` names them
        shutil.copy(dataset.parent / f"case{case}_label.nii.gz", folder / f"case{case}.nii.gz")
    assert evaluate(dataset, folder) == 0
    one = (folder / "scores" / "summary.csv").read_bytes()
    assert evaluate(dataset, folder) == 2, "never replaced unasked"
    assert evaluate(dataset, folder, "--overwrite", "--processes", "2", "--labels", *INTEGERS) == 0
    assert (folder / "scores" / "summary.csv").read_bytes() == one


def test_a_map_without_an_affine_lies_on_its_image_s_grid(dataset, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    label = nibabel.load(dataset.parent / "case0_label.nii.gz")
    label.set_sform(None)
    label.set_qform(None)
    nibabel.save(label, folder / "case0.nii.gz")
    assert evaluate(dataset, folder) == 0
    assert {row["dsc"] for row in scores(folder / "scores").values()} == {"1.0"}


def test_a_mistyped_organ_is_no_background(dataset, tmp_path, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_label_map(folder / "case0.nii.gz", make_case(0)[1])
    assert evaluate(dataset, folder, "--labels", "2=livr", "7=spleen") == 2
    assert "nearest: liver" in capsys.readouterr().err
    assert evaluate(dataset, folder, "--labels", "2=liver") == 0
    assert "left_kidney, right_kidney, spleen: not predicted, and not scored" in capsys.readouterr().err
    (folder / "case0.nii.gz").write_bytes(b"")
    assert evaluate(dataset, folder, "--overwrite") == 3
    assert not (folder / "scores" / "cases.csv").exists(), "scores of other maps are no result"


def test_two_entries_of_one_image_have_one_prediction(tmp_path):
    dataset = write_dataset(tmp_path / "set", ["a", "b"], entries={"b": {"patient": "a"}})
    dataset.write_text(dataset.read_text().replace("image: b.nii.gz", "image: a.nii.gz"))
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_label_map(folder / "a.nii.gz", make_case(0)[1])
    assert evaluate(dataset, folder) == 0
    assert {case for case, _ in scores(folder / "scores")} == {"tiny/a", "tiny/b"}


def test_one_map_is_not_the_prediction_of_two_cases(tmp_path, capsys):
    dataset = write_dataset(tmp_path / "set", ["a", "b"])
    for scan in ("a", "b"):
        (tmp_path / "set" / scan).mkdir()
        (tmp_path / "set" / f"{scan}.nii.gz").rename(tmp_path / "set" / scan / "ct.nii.gz")
    text = dataset.read_text()
    dataset.write_text(text.replace("image: a.nii.gz", "image: a/ct.nii.gz").replace("image: b.nii", "image: b/ct.nii"))
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_label_map(folder / "ct.nii.gz", make_case(0)[1])
    assert evaluate(dataset, folder) == 2
    assert "of a or of b?" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["300=liver", "-1=liver", "\u00b2=liver"])
def test_integers_that_a_map_cannot_have(dataset, tmp_path, capsys, label):
    (tmp_path / "theirs").mkdir()
    assert evaluate(dataset, tmp_path / "theirs", f"--labels={label}") == 2
    assert "expected" in capsys.readouterr().err


def test_an_integer_is_one_organ(dataset, tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    assert evaluate(dataset, tmp_path / "theirs", "--labels", "2=liver", "02=spleen") == 2
    assert "2 is given twice, as liver and as spleen" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_anything_is_scored(dataset, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_label_map(folder / "case0.nii.gz", make_case(0)[1])
    monkeypatch.setattr("organseg.cli.scoring.score_case", lambda *_: pytest.fail("scored"))
    words = ["evaluate", str(dataset), "--predictions", str(folder), "--out", str(dataset / "in a file")]
    assert run([*words, "--processes", "1"]) == 5
    assert "cannot be made" in capsys.readouterr().err
