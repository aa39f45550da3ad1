import gzip
import itertools
import tracemalloc

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from organseg.errors import StorageError
from organseg.volumes import compare_geometry, read_image, read_label, to_file, write_image, write_label, write_map

ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def affine_of(axes, flips, degrees=0.0) -> np.ndarray:
    """File axis i runs along world axis axes[i], in the direction flips[i]; then turned about an oblique axis."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for file_axis, (world_axis, flip) in enumerate(zip(axes, flips, strict=True)):
        affine[world_axis, file_axis] = flip * (0.75, 1.25, 3.0)[file_axis]
    affine[:3, :3] = Rotation.from_rotvec([degrees, degrees / 2, 0], degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = (-120, 85, 33.5)
    return affine


@pytest.mark.parametrize("degrees", [0, 13])
@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_read_and_write_keep_every_voxel_in_its_place(make_file, tmp_path, organs, axes, flips, degrees):
    source = make_file(organs, "source.nii", affine=affine_of(axes, flips, degrees))
    label, warnings = read_label(source, case="c1")
    write_label(tmp_path / "out.nii", label.array, label.affine)
    assert warnings == []
    # nibabel knows nothing of our order of axes: same voxel, same value, same place in the world.
    before, after = nibabel.load(source), nibabel.load(tmp_path / "out.nii")
    assert (np.asarray(after.dataobj) == organs).all()
    for form in ("sform", "qform"):
        assert np.allclose(getattr(after, f"get_{form}")(), getattr(before, f"get_{form}")(), atol=2e-5)
        assert int(after.header[f"{form}_code"]) == 1
    again, warnings = read_label(tmp_path / "out.nii", case="c1")
    assert warnings == []
    assert (again.array == label.array).all()
    assert compare_geometry(label, again, case="c1") == []


def test_left_is_left(make_file):
    # File voxel (0, 4, 7) is world (60, 20, 30) mm RAS: right, anterior and superior of the origin.
    affine = np.diag([-10.0, -10, 10, 1])
    affine[:3, 3] = (60, 60, -40)
    array = np.zeros((11, 11, 11), np.uint8)
    array[0, 4, 7] = 1
    label, _ = read_label(make_file(array, affine=affine), case="c1")
    assert np.argwhere(label.array).tolist() == [[7, 4, 0]]
    assert (label.index_to_mm @ [7, 4, 0, 1]).tolist() == pytest.approx([30, -20, -60, 1])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_the_same_label_gives_the_same_bytes(tmp_path, organs, las, name):
    array = np.ascontiguousarray(organs.T)
    write_label(tmp_path / name, array, las)
    (tmp_path / "sub").mkdir()
    write_label(tmp_path / "sub" / f"other_{name}", np.asfortranarray(array), las)
    first = (tmp_path / name).read_bytes()
    assert first == (tmp_path / "sub" / f"other_{name}").read_bytes()
    if name.endswith("gz"):
        assert first[:3] == b"\x1f\x8b\x08"
        assert first[3] == 0  # no name, no comment
        assert first[4:8] == bytes(4)  # no time


def test_the_written_header_says_nothing_of_where_it_comes_from(tmp_path, organs, las):
    write_label(tmp_path / "a.nii", organs.T, las)
    header = nibabel.load(tmp_path / "a.nii").header
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        assert bytes(header[field]) == bytes(header[field].dtype.itemsize) or header[field].item() == b""
    assert list(header.extensions) == []
    assert header.get_xyzt_units()[0] == "mm"
    assert (tmp_path / "a.nii").stat().st_size == 352 + organs.size
    assert header.get_data_dtype() == np.uint8


def test_names_in_the_source_do_not_travel(make_file, tmp_path, organs):
    extension = b"\1\0\0\0" + (32).to_bytes(4, "little") + (6).to_bytes(4, "little") + b"CANARY".ljust(24)
    names = dict.fromkeys(("descrip", "aux_file", "db_name", "intent_name"), b"CANARY")
    label, _ = read_label(make_file(organs, gap=extension, **names), case="c1")
    write_label(tmp_path / "out.nii.gz", label.array, label.affine)
    assert b"CANARY" not in gzip.decompress((tmp_path / "out.nii.gz").read_bytes())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_maps_are_stored_in_steps_of_a_255th(tmp_path, las, dtype):
    probs = np.random.default_rng(1).random((5, 6, 7)).astype(dtype)
    probs[0, 0, :4] = 0, 1, 1.0001, -1e-4
    write_map(tmp_path / "p.nii.gz", probs, las)
    image = nibabel.load(tmp_path / "p.nii.gz")
    assert image.get_data_dtype() == np.uint8
    back = image.get_fdata()
    assert np.abs(back - to_file(np.clip(probs.astype(float), 0, 1), las)).max() < 0.5 / 255 + 1e-6
    assert (back.min(), back.max()) == pytest.approx((0, 1), abs=1e-7)


def test_maps_may_be_quantised_already_or_exact(tmp_path, las):
    steps = np.random.default_rng(1).integers(0, 256, (5, 6, 7)).astype(np.uint8)
    write_map(tmp_path / "u.nii", steps, las)
    assert np.allclose(nibabel.load(tmp_path / "u.nii").get_fdata(), to_file(steps / 255, las), atol=1e-6)
    write_map(tmp_path / "v.nii", steps, las, dtype="float32")
    assert np.allclose(nibabel.load(tmp_path / "v.nii").get_fdata(), to_file(steps / 255, las), atol=1e-6)
    probs = np.random.default_rng(1).random((5, 6, 7)).astype(np.float32)
    write_map(tmp_path / "f.nii.gz", probs, las, dtype="float32")
    back, _ = read_image(tmp_path / "f.nii.gz", case="c1")
    assert (back.array == probs).all()


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_images_come_back_as_they_were(tmp_path, las, dtype):
    array = (np.random.default_rng(1).normal(0, 300, (5, 6, 7))).astype(dtype)
    write_image(tmp_path / "i.nii.gz", array, las)
    volume, warnings = read_image(tmp_path / "i.nii.gz", case="c1")
    assert warnings == []
    assert volume.array.dtype == dtype
    assert (volume.array == array).all()


def test_a_slightly_sheared_grid_is_written_by_its_sform_alone(tmp_path, las):
    # The reader accepts up to 1e-3 of shear; over 512 voxels that is more than a quaternion may drop.
    sheared = las.copy()
    sheared[0, 1] = 0.0007
    array = np.zeros((2, 512, 4), np.uint8)
    write_label(tmp_path / "s.nii", array, sheared)
    header = nibabel.load(tmp_path / "s.nii").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)
    label, warnings = read_label(tmp_path / "s.nii", case="c1")
    assert warnings == []
    assert np.allclose(label.affine, sheared, atol=1e-6)


def test_other_types_and_names_are_programming_errors(tmp_path, las):
    array = np.zeros((2, 2, 2))
    for call in (
        lambda: write_label(tmp_path / "a.nii", array, las),
        lambda: write_image(tmp_path / "a.nii", array, las),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="ends in"):
        write_label(tmp_path / "a.nrrd", array.astype(np.uint8), las)
    assert list(tmp_path.iterdir()) == []


def test_a_label_that_cannot_be_written_is_a_storage_error(tmp_path, organs, las):
    with pytest.raises(StorageError, match="missing"):
        write_label(tmp_path / "missing" / "a.nii.gz", organs, las)


def test_reading_takes_the_result_and_a_slab(make_file):
    # float64 in the file, 17 MB; int16 in memory, 4 MB.
    path = make_file(np.random.default_rng(2).integers(-900, 900, (256, 256, 32)).astype(np.float64))
    tracemalloc.start()
    try:
        volume, _ = read_image(path, case="c1")
        assert volume.array.dtype == np.int16
        assert tracemalloc.get_traced_memory()[1] < volume.array.nbytes + (20 << 20)
    finally:
        tracemalloc.stop()


REAL = {
    "btcv/RawData/Training/{}/{}0001.nii.gz": ("LAS", "img", "label", "CT", (100, 256, 256), (3.0, 1.169, 1.169)),
    "btcv/RawData/Training/{}/{}0035.nii.gz": ("LAS", "img", "label", "CT", (56, 256, 256), (5.0, 1.61, 1.61)),
    "totalsegmentator_sample/{}.nii.gz": ("RAS", "example_ct_sm", "example_seg", "CT", (30, 101, 122), (3, 3, 3)),
    "chaos/MR_T2SPIR_nifti/{}_22.nii.gz": ("LAS", "image", "label", "MR", (38, 256, 256), (7.7, 1.25, 1.25)),
}


@pytest.mark.parametrize(("pattern", "known"), REAL.items(), ids=["btcv 1", "btcv 35", "totalsegmentator", "chaos MR"])
def test_real_scans(scans, tmp_path, pattern, known):
    codes, image_name, label_name, modality, shape, spacing = known
    image_path, label_path = (scans / pattern.format(name, name) for name in (image_name, label_name))
    image, warnings = read_image(image_path, case="real", modality=modality)
    label, label_warnings = read_label(label_path, case="real")
    assert warnings + label_warnings == []
    assert (image.array.dtype, label.array.dtype) == (np.int16, np.uint8)
    assert image.shape == shape
    assert image.spacing == pytest.approx(spacing, abs=6e-4)
    assert compare_geometry(image, label, case="real") == []
    outside = nibabel.load(label_path)
    assert "".join(nibabel.aff2axcodes(outside.affine)) == codes
    ras = np.asarray(nibabel.as_closest_canonical(outside).dataobj)
    assert (label.array == ras[::-1, ::-1].T).all()
    write_label(tmp_path / "out.nii.gz", label.array, label.affine)
    written = nibabel.load(tmp_path / "out.nii.gz")
    assert (np.asarray(written.dataobj) == np.asarray(outside.dataobj)).all()
    assert np.allclose(written.affine, outside.affine, atol=1e-4)


def test_organs_lie_where_they_do_in_people(scans):
    label, _ = read_label(scans / "btcv/RawData/Training/label/label0001.nii.gz", case="real")
    centre = {
        organ: np.argwhere(label.array == value).mean(axis=0)
        for value, organ in enumerate(("", "spleen", "right_kidney", "left_kidney"))
    }
    liver, aorta = (np.argwhere(label.array == value).mean(axis=0) for value in (6, 8))
    # x grows to the left, y to posterior, z to superior.
    assert liver[2] < aorta[2] < centre["spleen"][2]
    assert centre["right_kidney"][2] < aorta[2] < centre["left_kidney"][2]
    assert liver[1] < centre["right_kidney"][1]
    assert liver[0] > centre["right_kidney"][0]


def test_btcv_original_labels_have_no_affine_and_say_so(scans):
    path = scans / "btcv/RawData/Training/label_original512/label0001.nii.gz"
    label, (warning,) = read_label(path, case="real", assume_affine=True)
    assert warning.field == "affine"
    resampled, _ = read_label(scans / "btcv/RawData/Training/label/label0001.nii.gz", case="real")
    # DATA.md: 32 pixels cropped, every 1.75th pixel, 47 slices cut. The assumed axes put each organ on its own.
    steps = 32 + np.floor((np.arange(256) + 0.5) * 448 / 256).astype(int)
    overlap = label.array[47:][:, steps][:, :, steps] == resampled.array
    assert overlap[resampled.array > 0].mean() > 0.9
