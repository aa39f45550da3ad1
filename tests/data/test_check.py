"""FAULTS.md section 3, the rows on label values and pairs of files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic import AFFINE, LABELS, SHAPE, make_case, write_dataset, write_label_map, write_scan

from organseg.data.check import Examined, check, examine
from organseg.data.manifest import load_manifest
from organseg.errors import Fault, InputError

VALUE = {organ: value for value, organ in LABELS.items()}
Change = Callable[[np.ndarray], np.ndarray | None]


def look(folder: Path, change: Change | None = None, *, affine: np.ndarray = AFFINE, **entry: object) -> Examined:
    """Examine case0 after a change to its label map."""
    manifest = load_manifest(write_dataset(folder, 1, entries={"case0": entry}))
    label = make_case(0)[1]
    if change is not None:
        changed = change(label)
        label = label if changed is None else changed
    if manifest.cases[0].label:
        write_label_map(folder / "case0_label.nii.gz", label, affine)
    return examine(manifest, manifest.cases[0])


def refusals(*arguments: object, **options: object) -> list[Fault]:
    with pytest.raises(InputError) as caught:
        look(*arguments, **options)
    assert str(caught.value) == "\n".join(map(str, caught.value.faults))
    return [fault for fault in caught.value.faults if fault.refused]


def put(value: int, where: tuple[int, int, int] = (0, 5, 5)) -> Change:
    def change(label: np.ndarray) -> None:
        label[where] = value

    return change


def test_a_good_case_comes_through_voxel_by_voxel_without_a_word(tmp_path):
    found = look(tmp_path)
    image, label = make_case(0)
    assert found.warnings == ()
    assert (found.image.array == image).all()
    assert found.label.dtype == np.uint8
    # The cache counts organs in the order of the file's integers: 2 3 5 7 -> 1 2 3 4.
    assert (found.label == np.select([label == value for value in LABELS], range(1, 5))).all()
    assert len(found.image_sha256) == len(found.label_sha256) == 64


def test_ignore_is_always_allowed(tmp_path):
    assert look(tmp_path, put(255)).label[0, 5, 5] == 255


def test_integers_without_a_name_are_refused_and_listed(tmp_path):
    faults = refusals(tmp_path, lambda label: put(9)(label) or put(4, (0, 5, 6))(label))
    assert [fault.found for fault in faults] == ["4", "9"]
    assert {fault.expected for fault in faults} == {"0, 255 or one of 2, 3, 5, 7"}
    assert {(fault.case, fault.path) for fault in faults} == {("case0", "case0_label.nii.gz")}


def test_voxels_of_an_organ_that_is_not_annotated_are_refused(tmp_path):
    (fault,) = refusals(tmp_path, annotated=["liver", "left_kidney", "right_kidney"])
    assert (fault.found, fault.expected) == ("spleen (7)", "annotated organs only")
    assert "hide" in fault.remedy


def test_hidden_voxels_become_zero(tmp_path):
    found = look(tmp_path, hide=["spleen", "liver"])
    label = make_case(0)[1]
    assert found.warnings == ()
    assert (found.label[np.isin(label, [VALUE["spleen"], VALUE["liver"], 0])] == 0).all()
    assert (found.label[label == VALUE["left_kidney"]] == 2).all()
    assert set(np.unique(found.label)) == {0, 2, 3}


def test_an_annotated_organ_without_voxels_is_absent_with_a_warning(tmp_path):
    found = look(tmp_path, lambda label: np.where(label == VALUE["spleen"], 0, label).astype(np.uint8))
    (warning,) = found.warnings
    assert (warning.field, warning.found, warning.refused) == ("spleen", "no voxel", False)
    assert "absent" in warning.remedy


def test_an_organ_that_nobody_annotates_may_be_empty(tmp_path):
    without = lambda label: np.where(label == VALUE["spleen"], 0, label).astype(np.uint8)  # noqa: E731
    assert look(tmp_path, without, annotated=["liver", "left_kidney", "right_kidney"]).warnings == ()


def test_swapped_kidneys_are_warned_of(tmp_path):
    def swap(label):
        left, right = label == VALUE["left_kidney"], label == VALUE["right_kidney"]
        label[left], label[right] = VALUE["right_kidney"], VALUE["left_kidney"]

    (warning,) = look(tmp_path, swap).warnings
    assert (warning.field, warning.found) == ("left_kidney", "right of right_kidney")
    assert not warning.refused


def test_volumes_and_intensities_that_nobody_has_are_warned_of(tmp_path):
    def nonsense(label):
        label[label == VALUE["liver"]] = 0
        label[5, 10:12, 10:12] = VALUE["liver"]  # 4 voxels of 0.72 mL
        label[2, 0, :20] = VALUE["left_kidney"]  # in the air, -1000 HU

    warnings = {(warning.field, warning.found) for warning in look(tmp_path, nonsense).warnings}
    assert ("liver", "2.9 mL") in warnings
    (mean,) = [found for field, found in warnings if field == "left_kidney"]
    assert mean.startswith("mean -")


def test_another_shape_is_refused(tmp_path):
    (fault,) = refusals(tmp_path, lambda label: label[:, :, 1:].copy())
    assert (fault.field, fault.found) == ("shape", "(12, 32, 31) (z, y, x)")


@pytest.mark.parametrize("shift", [0.0009, 0.0011])
def test_another_affine_is_refused_beyond_a_thousandth(tmp_path, shift):
    affine = AFFINE.copy()
    affine[0, 3] += shift
    if shift < 1e-3:
        assert look(tmp_path, affine=affine).warnings == ()
    else:
        (fault,) = refusals(tmp_path, affine=affine)
        assert (fault.field, fault.path) == ("affine", "case0_label.nii.gz")


def test_a_label_map_in_another_order_of_axes_is_the_same_label_map(tmp_path):
    affine = AFFINE.copy()
    affine[0] *= -1
    affine[0, 3] = AFFINE[0, 3] + 8.0 * (SHAPE[2] - 1)  # LAS: the same voxels from the other side
    turned = look(tmp_path / "turned", affine=affine)
    assert turned.warnings == ()
    assert (turned.label == look(tmp_path / "straight").label).all()


def test_an_unlabelled_case_has_an_empty_label(tmp_path):
    found = look(tmp_path, label=None)
    assert found.label.shape == SHAPE
    assert not found.label.any()
    assert (found.label_sha256, found.warnings) == ("", ())


def test_faults_of_image_and_label_are_told_together(tmp_path):
    manifest = load_manifest(write_dataset(tmp_path, 1))
    write_scan(tmp_path / "case0.nii.gz", np.zeros(SHAPE, np.int16))
    label = make_case(0)[1]
    label[0, 0, 0] = 100
    write_label_map(tmp_path / "case0_label.nii.gz", label)
    with pytest.raises(InputError) as caught:
        examine(manifest, manifest.cases[0])
    assert {(fault.path, fault.field) for fault in caught.value.faults} == {
        ("case0.nii.gz", "voxels"),
        ("case0_label.nii.gz", "label values"),
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_check_goes_on_after_a_refusal_and_finds_the_same_image_twice(tmp_path, processes):
    manifest = load_manifest(write_dataset(tmp_path, 4))
    (tmp_path / "case2.nii.gz").write_bytes((tmp_path / "case0.nii.gz").read_bytes())
    (tmp_path / "case2_label.nii.gz").write_bytes((tmp_path / "case0_label.nii.gz").read_bytes())
    (tmp_path / "case1.nii.gz").write_bytes(b"")
    findings = list(check(manifest, processes))
    assert [(finding.dataset, finding.case) for finding in findings] == [("tiny", f"case{i}") for i in range(4)]
    assert [bool(finding.voxels) for finding in findings] == [True, False, True, True]
    assert [fault.refused for fault in findings[1].faults] == [True]
    (twin,) = findings[2].faults
    assert (twin.found, twin.path, twin.refused) == ("the same file as case case0", "case2.nii.gz", False)
    assert findings[3].faults == ()
    label = make_case(0)[1]
    assert findings[0].voxels == tuple((label == value).sum() for value in sorted(LABELS))
