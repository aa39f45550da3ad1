"""One row of FAULTS.md section 3 each: the voxels' values."""

import numpy as np
import pytest

from organseg.errors import InputError
from organseg.volumes import read_image, read_label, to_canonical


def put(array, value, count=1, dtype=None):
    """A copy with `value` in the first voxels."""
    result = array.astype(dtype or array.dtype)
    result.reshape(-1)[:count] = value
    return result


@pytest.fixture
def wide() -> np.ndarray:
    """[X, Y, Z] int16 of 10,000 voxels, of which 10 are 0.1 %."""
    return np.random.default_rng(7).integers(-900, 900, (25, 20, 20)).astype(np.int16)


def faults_of(read, path, **options):
    with pytest.raises(InputError) as caught:
        read(path, case="c1", **options)
    return [(fault.field, fault.found) for fault in caught.value.faults if fault.refused]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("modality", "fill"), [("CT", -1024), ("MR", 0)])
def test_few_bad_voxels_are_replaced_and_told(make_file, wide, las, bad, modality, fill):
    volume, (warning,) = read_image(make_file(put(wide, bad, 10, "f4")), case="c1", modality=modality)
    assert (warning.field, warning.refused) == ("voxels", False)
    assert "10 " in warning.found
    assert volume.array.dtype == np.int16
    assert (volume.array == to_canonical(put(wide, fill, 10), las)).all()


def test_more_than_a_thousandth_of_bad_voxels_is_refused(make_file, wide):
    assert faults_of(read_image, make_file(put(wide, np.nan, 11, "f4"))) == [
        ("voxels", "11 of 10000 voxels NaN or infinite")
    ]
    assert len(faults_of(read_image, make_file(np.full_like(wide, np.nan, dtype="f4")))) == 1


def test_a_signalling_nan_is_a_nan(make_file, wide, organs):
    array = wide.astype("f4")
    array.view("u4")[0, 0, 0] = 0x7F800001
    _, (warning,) = read_image(make_file(array), case="c1")
    assert warning.found.startswith("1 NaN")
    labels = organs.astype("f4")
    labels.view("u4")[0, 0, 0] = 0x7F800001
    assert len(faults_of(read_label, make_file(labels))) == 1


def test_values_that_overflow_when_scaled_are_bad_voxels(make_file, wide):
    path = make_file(put(wide, 1e300, 11, "f8"), scl_slope=1e30)
    assert "11 of 10000" in faults_of(read_image, path, modality="MR")[0][1]


@pytest.mark.parametrize("value", [-32769, 32768, 1e9])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i4"])
def test_ct_outside_int16_is_refused_and_mr_kept(make_file, wide, las, value, dtype):
    path = make_file(put(wide, value, 1, dtype))
    assert [field for field, _ in faults_of(read_image, path)] == ["voxels"]
    volume, warnings = read_image(path, case="c1", modality="MR")
    assert warnings == []
    assert volume.array.dtype == np.float32
    assert (volume.array == to_canonical(put(wide, value, 1, "f4"), las)).all()


@pytest.mark.parametrize("value", [-32768, 32767])
def test_the_ends_of_int16_are_hu(make_file, wide, las, value):
    volume, _ = read_image(make_file(put(wide, value, 1, "i4")), case="c1")
    assert (volume.array == to_canonical(put(wide, value), las)).all()


def test_a_constant_image_is_refused(make_file, wide):
    for constant in (np.full_like(wide, -5), put(np.full_like(wide, 40), np.nan, 3, "f4")):
        (fault,) = faults_of(read_image, make_file(constant))
        assert "everywhere" in fault[1]


@pytest.mark.parametrize(("low", "high", "told"), [(0, 4095, 1), (0, 4000, 1), (-1, 4095, 0), (0, 800, 0)])
def test_raw_scanner_numbers_are_told(make_file, wide, low, high, told):
    array = np.clip(wide, 1, 700)
    array[0, 0, :2] = low, high
    _, warnings = read_image(make_file(array), case="c1")
    assert [(fault.field, fault.refused) for fault in warnings] == [("voxels", False)] * told
    assert read_image(make_file(array), case="c1", modality="MR")[1] == []


@pytest.mark.parametrize(
    ("slope", "inter", "dtype"),
    [(1, -1024, "i2"), (2, 5, "i2"), (-1, 0, "i2"), (0.5, 0, "f4"), (1, 0.25, "f4"), (1e-3, 0, "f4")],
)
def test_scaling(make_file, wide, las, slope, inter, dtype):
    volume, warnings = read_image(make_file(wide, scl_slope=slope, scl_inter=inter), case="c1")
    expected = to_canonical(wide.astype("f8") * float(np.float32(slope)) + float(np.float32(inter)), las)
    assert warnings == []
    assert volume.array.dtype == np.dtype(dtype)
    assert (volume.array == expected.astype(dtype)).all()


def test_a_fraction_in_the_last_slice_keeps_all_before_it(make_file, las):
    # Several slabs: the change to float32 comes after int16 slabs were stored.
    array = np.random.default_rng(8).integers(-900, 900, (256, 256, 20)).astype(np.float64)
    array[3, 4, -1] = 0.5
    volume, _ = read_image(make_file(array, "case.nii"), case="c1")
    assert volume.array.dtype == np.float32
    assert (volume.array == to_canonical(array, las)).all()


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_labels_of_every_type(make_file, organs, las, dtype):
    organs = np.where(organs == 255, 100, organs) if dtype == "i1" else organs
    volume, warnings = read_label(make_file(organs.astype(dtype)), case="c1")
    assert warnings == []
    assert volume.array.dtype == np.uint8
    assert (volume.array == to_canonical(organs, las)).all()


@pytest.mark.parametrize("deviation", [1e-3, -1e-3, 1e-4, -1e-4])
def test_labels_nearly_whole_are_rounded_and_told(make_file, organs, las, deviation):
    volume, (warning,) = read_label(make_file(put(organs, 1 + deviation * 0.99, 4, "f8")), case="c1")
    assert (warning.field, warning.refused) == ("label values", False)
    assert "4 voxels" in warning.found
    assert (volume.array == to_canonical(put(organs, 1, 4), las)).all()


def test_scaled_labels_are_exact(make_file, organs, las):
    organs = np.where(organs == 255, 3, organs)
    volume, warnings = read_label(make_file(organs * np.uint8(2), scl_slope=0.5), case="c1")
    assert warnings == []
    assert (volume.array == to_canonical(organs, las)).all()


@pytest.mark.parametrize(
    ("value", "dtype", "found"),
    [
        (np.nan, "f4", "2 voxels NaN or infinite, e.g. nan"),
        (np.inf, "f8", "2 voxels NaN or infinite, e.g. inf"),
        (-1, "i2", "2 voxels negative, e.g. -1"),
        (-1.0, "f4", "2 voxels negative, e.g. -1"),
        (0.5, "f4", "2 voxels not whole, e.g. 0.5"),
        (1.0011, "f8", "2 voxels not whole, e.g. 1.0011"),
        (256, "i2", "2 voxels above 255, e.g. 256"),
        (2**40, "i8", "2 voxels above 255"),
        (1e30, "f4", "2 voxels above 255, e.g. 1e+30"),
    ],
)
def test_other_label_values_are_refused(make_file, organs, value, dtype, found):
    ((field, text),) = faults_of(read_label, make_file(put(organs, value, 2, dtype)))
    assert field == "label values"
    assert found in text


def test_all_faults_of_a_label_come_at_once(make_file, organs):
    array = organs.astype("f4")
    array.reshape(-1)[:4] = np.nan, -2, 300, 0.5
    assert len(faults_of(read_label, make_file(array))) == 4


def test_an_empty_label_map_is_a_label_map(make_file, organs):
    volume, warnings = read_label(make_file(np.zeros_like(organs)), case="c1")
    assert not volume.array.any()
    assert warnings == []
