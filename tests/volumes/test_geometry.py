"""One row of FAULTS.md section 3 each: zooms, affines, and a label's grid against its image's."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from organseg.errors import InputError
from organseg.volumes import Volume, compare_geometry, read_image, spacing_of, to_canonical
from organseg.volumes.geometry import difference

ZOOMS = [0.8, 0.8, 2.5]


def pixdim(*zooms):
    return dict(pixdim=[1, *zooms, 1, 1, 1, 1])


def srow(matrix):
    """Only the sform is set, to this."""
    return dict(srow_x=matrix[0], srow_y=matrix[1], srow_z=matrix[2], qform_code=0)


def scaled(factor):
    return srow(np.diag([factor, factor, factor, 1]))


SHEARED = np.array([[0.8, 0.002, 0, 0], [0, 0.8, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1]])

REFUSED = {
    "zoom 0": (pixdim(0.8, 0, 2.5), "pixdim", "0.8 x 0 x 2.5"),
    "zoom NaN": (pixdim(0.8, 0.8, np.nan), "pixdim", "nan"),
    "zoom negative": (pixdim(-0.8, 0.8, 2.5), "pixdim", "-0.8"),
    "zoom above 20 mm": (pixdim(0.8, 0.8, 20.1), "pixdim", "20.1"),
    "zoom below 0.05 mm": (pixdim(0.8, 0.049, 2.5), "pixdim", "0.049"),
    "zoom infinite": (pixdim(0.8, 0.8, np.inf), "pixdim", "inf"),
    "affine's voxels above 20 mm": (scaled(21), "affine", "21 x 21 x 21"),
    "affine's voxels below 0.05 mm": (scaled(0.04), "affine", "0.04 x"),
    "metres": (dict(xyzt_units=1), "xyzt_units", "metre"),
    "micrometres": (dict(xyzt_units=3), "xyzt_units", "micrometre"),
    "no affine": (dict(sform_code=0, qform_code=0), "affine", "sform_code 0 and qform_code 0"),
    "unknown code": (dict(sform_code=9), "sform_code", "9"),
    "negative code": (dict(qform_code=-1), "qform_code", "-1"),
    "origin NaN": (dict(srow_x=[-0.8, 0, 0, np.nan], qform_code=0), "affine", "not finite"),
    "axis infinite": (dict(srow_x=[np.inf, 0, 0, 0], qform_code=0), "affine", "not finite"),
    "origin outside the building": (dict(srow_x=[-0.8, 0, 0, 2e5], qform_code=0), "affine", "an origin at 2e+05"),
    "singular": (srow(np.array([[0.8, 0.8, 0, 0], [0.8, 0.8, 0, 0], [0, 0, 1, 0]])), "affine", "singular"),
    "all zero": (srow(np.zeros((3, 4))), "affine", "singular"),
    "sheared": (srow(SHEARED), "affine", "sheared"),
    "forms 2 mm apart": (dict(qoffset_x=92), "affine", "differ by 2 mm"),
    "forms mirrored": (dict(srow_x=[0.8, 0, 0, 90]), "affine", "180 degrees"),
    "no rotation": (dict(quatern_b=0.9, quatern_c=0.9), "qform", "no rotation"),
    "rotation NaN": (dict(quatern_b=np.nan), "affine", "differ by nan"),
    "qfac 2": (dict(pixdim=[2, *ZOOMS, 1, 1, 1, 1]), "qform", "no rotation"),
}


@pytest.mark.parametrize(("fields", "field", "found"), REFUSED.values(), ids=REFUSED)
def test_refused(make_file, hounsfield, fields, field, found):
    with pytest.raises(InputError) as caught:
        read_image(make_file(hounsfield, **fields), case="c1")
    fault = next(fault for fault in caught.value.faults if fault.field == field and fault.refused)
    assert found in fault.found
    assert fault.expected
    assert fault.remedy


def read_affine(path, **options) -> np.ndarray:
    volume, warnings = read_image(path, case="c1", **options)
    assert warnings == []
    return volume.affine


def turned(affine, degrees):
    """The affine rotated about z through its own first voxel."""
    result = affine.copy()
    result[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() @ affine[:3, :3]
    return result


@pytest.mark.parametrize(("degrees", "accepted"), [(0.9, True), (1.1, False), (-1.1, False)])
def test_forms_may_be_one_degree_apart(make_file, hounsfield, las, degrees, accepted):
    # The array is so small that 1.1 degrees move no corner by 1 mm.
    rows = dict(zip(("srow_x", "srow_y", "srow_z"), turned(las, degrees), strict=False))
    path = make_file(hounsfield, **rows)
    if accepted:
        assert np.allclose(read_affine(path), turned(las, degrees), atol=1e-5)
    else:
        with pytest.raises(InputError, match=r"1\.1 degrees"):
            read_image(path, case="c1")


@pytest.mark.parametrize(("shift", "accepted"), [(0.9, True), (1.1, False)])
def test_forms_may_be_one_millimetre_apart(make_file, hounsfield, las, shift, accepted):
    path = make_file(hounsfield, qoffset_y=-70 + shift)
    if accepted:
        assert np.allclose(read_affine(path), las, atol=1e-5)
    else:
        with pytest.raises(InputError, match=r"1\.1 mm"):
            read_image(path, case="c1")


def test_the_user_decides_between_two_affines(make_file, hounsfield, las):
    path = make_file(hounsfield, qoffset_x=60)
    moved = las.copy()
    moved[0, 3] = 60
    assert np.allclose(read_affine(path, affine_source="sform"), las, atol=1e-5)
    assert np.allclose(read_affine(path, affine_source="qform"), moved, atol=1e-5)


def test_a_broken_qform_does_no_harm_to_who_wants_the_sform(make_file, hounsfield, las):
    path = make_file(hounsfield, quatern_b=0.9, quatern_c=0.9)
    assert np.allclose(read_affine(path, affine_source="sform"), las, atol=1e-5)


@pytest.mark.parametrize("source", [None, "sform", "qform"])
@pytest.mark.parametrize("unset", ["sform", "qform"])
def test_the_form_that_is_set_is_used(make_file, hounsfield, las, unset, source):
    rubbish = dict(srow_x=[9, 9, 9, 9]) if unset == "sform" else dict(qoffset_x=7, quatern_b=np.nan)
    path = make_file(hounsfield, **{f"{unset}_code": 0}, **rubbish)
    assert np.allclose(read_affine(path, affine_source=source), las, atol=1e-5)


def test_qfac_0_means_1(make_file, hounsfield):
    affine = np.diag([0.8, 0.8, 2.5, 1])
    path = make_file(hounsfield, affine=affine, sform_code=0, pixdim=[0, *ZOOMS, 1, 1, 1, 1])
    assert np.allclose(read_affine(path), affine, atol=1e-5)


def test_an_assumed_affine_is_left_anterior_superior_and_said(make_file, hounsfield, las):
    path = make_file(hounsfield, sform_code=0, qform_code=0)
    volume, (warning,) = read_image(path, case="c1", assume_affine=True)
    assert not warning.refused
    assert "left, anterior, superior" in warning.remedy
    assert (volume.array == to_canonical(hounsfield, las)).all()
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.8))
    # The middle of 7 x 6 x 5 voxels is the origin.
    assert np.allclose(volume.affine @ [3, 2.5, 2, 1], [0, 0, 0, 1])


def test_assuming_does_not_override_what_is_set(make_file, hounsfield, las):
    assert np.allclose(read_affine(make_file(hounsfield), assume_affine=True), las, atol=1e-5)


def test_assuming_does_not_cover_broken_zooms(make_file, hounsfield):
    with pytest.raises(InputError, match="pixdim"):
        read_image(make_file(hounsfield, sform_code=0, qform_code=0, **pixdim(0, 1, 1)), case="c1", assume_affine=True)


def test_zooms_that_contradict_the_affine_are_told(make_file, hounsfield, las):
    volume, (warning,) = read_image(make_file(hounsfield, qform_code=0, **pixdim(0.8, 0.8, 3)), case="c1")
    assert (warning.field, warning.refused) == ("pixdim", False)
    assert volume.spacing[0] == pytest.approx(2.5)


def test_difference_by_hand():
    moved = np.eye(4)
    moved[:3, 3] = (3, 4, 0)
    assert difference(np.eye(4), moved, (2, 2, 2)) == (5, 0)
    quarter = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    # Corner (10, 10): (10, 10) against (-10, 10).
    assert difference(np.eye(4), quarter, (11, 11, 1)) == pytest.approx((20, 90))


def volume(array_xyz, affine) -> Volume:
    return Volume(to_canonical(array_xyz, affine), spacing_of(affine), affine)


def test_equal_grids(hounsfield, las):
    assert compare_geometry(volume(hounsfield, las), volume(hounsfield, las.copy()), case="c1") == []


def test_other_shape(hounsfield, las):
    (fault,) = compare_geometry(volume(hounsfield, las), volume(hounsfield[:, :, 1:], las), case="c1", path="l.nii")
    assert (fault.case, fault.path, fault.field, fault.refused) == ("c1", "l.nii", "shape", True)
    assert "(4, 6, 7)" in fault.found
    assert "(5, 6, 7)" in fault.expected


@pytest.mark.parametrize(("gap", "faults"), [(9e-4, 0), (1.1e-3, 1), (1, 1)])
@pytest.mark.parametrize("where", [(0, 3), (2, 3), (1, 1), (0, 2)])
def test_other_affine(hounsfield, las, where, gap, faults):
    other = las.copy()
    other[where] += gap
    found = compare_geometry(volume(hounsfield, las), volume(hounsfield, other), case="c1")
    assert [fault.field for fault in found] == ["affine"] * faults


def test_the_same_grid_in_another_axis_order(hounsfield, las):
    # The label's file is flipped along x and stored z first; its voxels lie where the image's do.
    flip = np.array([[-1, 0, 0, 6], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    z_first = np.eye(4)[:, [2, 0, 1, 3]]
    label = volume(hounsfield[::-1].transpose(2, 0, 1), las @ flip @ z_first)
    assert (label.array == volume(hounsfield, las).array).all()
    assert compare_geometry(volume(hounsfield, las), label, case="c1") == []


def test_mirrored_label_is_refused(hounsfield, las):
    mirrored = np.diag([-1, 1, 1, 1.0]) @ las
    assert compare_geometry(volume(hounsfield, las), volume(hounsfield, mirrored), case="c1")


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_a_label_with_the_image_s_origin_but_flipped_axes_is_refused(hounsfield, las, axes):
    # Whoever copied spacing and origin and forgot the directions: mirrored in silence, if origins alone counted.
    flipped = las.copy()
    flipped[:3, list(axes)] *= -1
    (fault,) = compare_geometry(volume(hounsfield, las), volume(hounsfield, flipped), case="c1")
    assert (fault.field, fault.refused) == ("affine", True)
