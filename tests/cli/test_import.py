"""`organseg import`: a folder becomes a dataset.yaml, and what that says is what is prepared."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from synthetic import LABELS, make_case, write_dataset, write_label_map

from organseg.cli import run
from organseg.data.cache import CachedCase
from organseg.data.manifest import load_manifest


def test_import_a_folder(tmp_path, capsys):
    write_dataset(tmp_path / "raw", 2)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "raw" / folder).mkdir()
    for case in ("case0", "case1"):
        (tmp_path / "raw" / f"{case}.nii.gz").rename(tmp_path / "raw" / "imagesTr" / f"{case}_0000.nii.gz")
        (tmp_path / "raw" / f"{case}_label.nii.gz").rename(tmp_path / "raw" / "labelsTr" / f"{case}.nii.gz")
    (tmp_path / "raw" / "labelsTr" / "case1.nii.gz").unlink()
    out = tmp_path / "new" / "dataset.yaml"
    words = ["import", "folder", str(tmp_path / "raw"), "--out", str(out), "--labels", "2=liver", "3=Kidney left"]
    words += ["5=kidney_r", "7=lien"]
    assert run(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        f"{out}: 2 cases, 1 of them labelled, 4 organs",
        "  liver: 2, annotated in 1 cases",
        "  left_kidney: 3, annotated in 1 cases",
        "  right_kidney: 5, annotated in 1 cases",
        "  spleen: 7, annotated in 1 cases",
        "each organ counts as annotated in every label map, and as absent where it has no voxel there;",
        "where that is not so: --annotated present, or `annotated: [...]` of a case",
        f"next: organseg check {out}",
    ]
    manifest = load_manifest(out)
    assert manifest.name == "raw"
    assert manifest.labels == LABELS
    assert [(case.id, case.label is None) for case in manifest.cases] == [("case0", False), ("case1", True)]
    assert run(["check", str(out), "--processes", "1"]) == 0
    before = out.read_bytes()
    assert run(words) == 2  # never overwritten unasked
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run([*words, "--overwrite", "--name", "other", "--modality", "MR"]) == 0
    assert (load_manifest(out).name, load_manifest(out).modality) == ("other", "MR")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["1:liver"], "found '1:liver', expected an integer"),
        (["x=liver"], "found 'x=liver'"),
        (["1=livr"], "nearest: liver"),
    ],
)
def test_labels_that_are_none(tmp_path, capsys, labels, message):
    (tmp_path / "images").mkdir()
    words = ["import", "folder", str(tmp_path), "--out", str(tmp_path / "d.yaml"), "--labels", *labels]
    assert run(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "d.yaml").exists()


def folders(root: Path, count: int) -> Path:
    """`images/` and `labels/` of synthetic cases."""
    write_dataset(root, count)
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for n in range(count):
        (root / f"case{n}_label.nii.gz").rename(root / "labels" / f"case{n}.nii.gz")
        (root / f"case{n}.nii.gz").rename(root / "images" / f"case{n}.nii.gz")
        (root / "images" / f"._case{n}.nii.gz").write_bytes(b"of macOS")
    return root


def test_parts_background_and_an_organ_of_one_s_own_from_import_to_scores(tmp_path, capsys):
    root, out = folders(tmp_path / "raw", 2), tmp_path / "d.yaml"
    words = ["import", "folder", str(root), "--out", str(out), "--labels", "2=liver", "3=liver", "5=background"]
    assert run([*words, "7=cancer"]) == 2
    said = capsys.readouterr().err
    assert "7: organ 'cancer' is not known" in said and "--new-organs NAME declares an organ" in said
    assert list(tmp_path.iterdir()) == [root]
    assert run([*words, "7=cancer", "--new-organs", "cancer"]) == 0
    assert "  liver: 2 and 3, annotated in 2 cases" in capsys.readouterr().out
    assert run(["check", str(out), "--processes", "1"]) == 0
    assert run(["prepare", str(out), "--out", str(tmp_path / "cache"), "--processes", "1"]) == 0
    case = CachedCase(tmp_path / "cache" / "raw" / "case1.h5")
    assert case.header.organs == ("liver", "cancer")
    source = load_manifest(out).cases[1].label
    values = np.unique(make_case(1)[1])
    assert {2, 3, 5, 7} <= set(values.tolist())
    table = np.zeros(256, np.uint8)
    table[[2, 3, 7]] = 1, 1, 2
    assert (case.arrays().label == table[make_case(1)[1]]).all()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "case1.nii.gz").write_bytes(source.read_bytes())
    words = ["evaluate", str(out), "--predictions", str(theirs), "--out", str(tmp_path / "scores"), "--processes", "1"]
    assert run(words) == 0
    assert "their integers are raw's" in capsys.readouterr().err
    rows = (tmp_path / "scores" / "cases.csv").read_text().splitlines()[1:]
    assert [row.split(",")[:4] for row in rows] == [
        ["raw/case1", organ, "found", "1.0"] for organ in ("liver", "cancer")
    ]


def test_organs_that_a_label_map_shows_are_what_it_annotates(tmp_path, capsys):
    root, out = folders(tmp_path / "raw", 5), tmp_path / "d.yaml"
    label = make_case(0)[1]
    for n in (0, 1):
        write_label_map(root / "labels" / f"case{n}.nii.gz", np.where(label == 2, label, 0).astype(np.uint8))
    integers = [f"{value}={organ}" for value, organ in LABELS.items()]
    words = ["import", "folder", str(root), "--out", str(out), "--overwrite", "--labels", *integers]
    assert run(words) == 0
    assert run(["check", str(out), "--processes", "1"]) == 0
    assert "spleen: no voxel in 2 of 5 cases that annotate it: really absent" in capsys.readouterr().err
    assert run([*words, "--annotated", "present"]) == 0
    found = {case.id: case.annotated for case in load_manifest(out).cases}
    assert found["case0"] == {"liver"} and found["case2"] == set(LABELS.values())
    before = out.read_bytes()
    (root / "labels" / "case3.nii.gz").write_bytes(b"no label map")
    assert run([*words, "--annotated", "present"]) == 3
    assert "refused: case3: labels/case3.nii.gz" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_an_import_that_fails_keeps_what_was_there(tmp_path, capsys):
    root, out = folders(tmp_path / "raw", 1), tmp_path / "d.yaml"
    words = ["import", "folder", str(root), "--out", str(out), "--labels", "2=liver"]
    assert run(words) == 0
    before = out.read_bytes()
    (root / "images" / "case0.nii.gz").rename(root / "images" / "case 0.nii.gz")
    assert run([*words, "--overwrite"]) == 2
    assert f"{out}: case case 0: id 'case 0'" in capsys.readouterr().err
    assert out.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"raw", "d.yaml"}


def two_affines(path: Path) -> np.ndarray:
    """Give a file a qform that puts it 40 mm above its sform; returns the qform."""
    image = nibabel.load(path)
    voxels, qform = np.asarray(image.dataobj), image.affine.copy()
    qform[2, 3] += 40
    again = nibabel.Nifti1Image(voxels, image.affine, image.header)
    again.set_sform(image.affine, code=1)
    again.set_qform(qform, code=1)
    nibabel.save(again, path)
    return qform


def test_a_manifest_says_which_affine_counts(tmp_path, capsys):
    dataset = write_dataset(tmp_path, 1)
    sform = nibabel.load(tmp_path / "case0.nii.gz").affine
    qform = two_affines(tmp_path / "case0.nii.gz")
    two_affines(tmp_path / "case0_label.nii.gz")
    words = ["prepare", str(dataset), "--processes", "1", "--out"]
    assert run([*words, str(tmp_path / "none")]) == 3
    assert "sform" in capsys.readouterr().err
    text = dataset.read_text()
    for source, affine in (("qform", qform), ("sform", sform)):
        dataset.write_text(f"affine: {source}\n{text}")
        assert run([*words, str(tmp_path / source)]) == 0
        found = np.asarray(CachedCase(tmp_path / source / "tiny" / "case0.h5").header.affine)
        assert np.allclose(found, affine)


def test_a_manifest_says_where_files_without_an_affine_lie(tmp_path):
    dataset = write_dataset(tmp_path, 1)
    for name in ("case0.nii.gz", "case0_label.nii.gz"):
        image = nibabel.load(tmp_path / name)
        header = image.header
        header["sform_code"] = header["qform_code"] = 0
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, header), tmp_path / name)
    words = ["prepare", str(dataset), "--processes", "1", "--out", str(tmp_path / "cache")]
    assert run(words) == 3
    dataset.write_text(f"assume_affine: true\n{dataset.read_text()}")
    assert run(words) == 0
    affine = np.asarray(CachedCase(tmp_path / "cache" / "tiny" / "case0.h5").header.affine)
    assert affine[0, 0] < 0 < affine[1, 1] and affine[2, 2] > 0  # x to the left is LPS+, in RAS negative


def test_import_of_nothing(tmp_path, capsys):
    out = ["--out", str(tmp_path / "d.yaml")]
    assert run(["import", "btcv", str(tmp_path / "gone"), *out]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert run(["import", "btcv", str(tmp_path), *out]) == 2
    assert "is this BTCV?" in capsys.readouterr().err
    assert run(["import", "folder", str(tmp_path), *out]) == 2
    assert "no folder of images here" in capsys.readouterr().err


def test_import_btcv(tmp_path, capsys):
    home = tmp_path / "RawData" / "Training"
    for folder in ("img", "label"):
        (home / folder).mkdir(parents=True)
    for number in ("0001", "0002"):
        (home / "img" / f"img{number}.nii.gz").write_bytes(b"x")
    (home / "label" / "label0001.nii.gz").write_bytes(b"x")
    out = tmp_path / "btcv.yaml"
    assert run(["import", "btcv", str(tmp_path), "--out", str(out)]) == 0
    manifest = load_manifest(out)
    assert [case.id for case in manifest.cases] == ["img0001", "img0002"]
    assert len(manifest.cases[0].annotated) == 13 and not manifest.cases[1].annotated
    # The organisers' integers: 1 spleen, 2 right kidney, 3 left kidney, 6 liver, 11 pancreas.
    assert [manifest.labels[i] for i in (1, 2, 3, 6, 11)] == [
        "spleen",
        "right_kidney",
        "left_kidney",
        "liver",
        "pancreas",
    ]
    assert run(["import", "btcv", str(tmp_path), "--out", str(out), "--overwrite", "--labels", "1=liver"]) == 2


def test_two_files_of_one_case_are_refused(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name in ("img7.nii.gz", "image_7.nii.gz"):
        (tmp_path / "images" / name).write_bytes(b"")
    assert run(["import", "folder", str(tmp_path), "--out", str(tmp_path / "d.yaml"), "--labels", "1=liver"]) == 2
    assert "image_7.nii.gz and img7.nii.gz are both case 7" in capsys.readouterr().err


def test_images_and_labels_in_one_folder(tmp_path, capsys):
    write_dataset(tmp_path, 2)
    for n in range(2):
        (tmp_path / f"case{n}.nii.gz").rename(tmp_path / f"image_{n}.nii.gz")
        (tmp_path / f"case{n}_label.nii.gz").rename(tmp_path / f"label_{n}.nii.gz")
    (tmp_path / "label_1.nii.gz").unlink()
    (tmp_path / "notes.nii.gz").write_bytes(b"")
    words = ["import", "folder", str(tmp_path), "--out", str(tmp_path / "d.yaml"), "--labels", "2=liver"]
    assert run(words) == 0
    found = [(case.id, case.label is None) for case in load_manifest(tmp_path / "d.yaml").cases]
    assert found == [("0", False), ("1", True)]
    (tmp_path / "label_0.nii.gz").unlink()
    assert run([*words, "--overwrite"]) == 2
    assert "or files image_* and label_*" in capsys.readouterr().err
