"""The synthetic cohort: deterministic, anatomically placed, plausible in HU and volume, ambiguous."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from organseg.anatomy import ORGANS, SEVEN_ORGANS
from organseg.data import phantom
from organseg.data.manifest import load_manifest
from organseg.data.phantom import PHANTOM_LABELS, Phantom, make_case, write_cohort
from organseg.data.phantom_body import paint_small_bowel
from organseg.errors import StorageError, UsageError

SMALL = (24, 32, 32)
LABEL = {organ: value for value, organ in PHANTOM_LABELS.items()}


@pytest.fixture(scope="module")
def cases() -> list[Phantom]:
    return [make_case(0, index, (64, 96, 96)) for index in range(10)]


def centre(case: Phantom, organ: str) -> np.ndarray:
    """Centre of mass in index coordinates (z, y, x)."""
    return np.argwhere(case.label == LABEL[organ]).mean(0)


def mean_hu(case: Phantom, organ: str) -> float:
    # eroded where anything is left: the edge is partial volume, not the organ
    mask = case.label == LABEL[organ]
    core = ndimage.binary_erosion(mask)
    return float(case.image[core if core.any() else mask].mean())


def test_labels_are_the_seven_organs_in_their_order() -> None:
    assert tuple(PHANTOM_LABELS[value] for value in range(1, 8)) == SEVEN_ORGANS


def test_a_case_is_a_pure_function_of_seed_index_and_shape() -> None:
    first = make_case(3, 1, SMALL)
    make_case(3, 0, SMALL)
    np.random.seed(1)  # the global generator must not matter
    again = make_case(3, 1, SMALL)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.label.tobytes() == again.label.tobytes()
    assert first.spacing == again.spacing
    assert first.image.dtype == np.int16 and first.label.dtype == np.uint8
    assert first.image.shape == first.label.shape == SMALL


def test_other_seeds_and_indices_are_other_patients() -> None:
    labels = {make_case(seed, index, SMALL).label.tobytes() for seed in range(3) for index in range(3)}
    assert len(labels) == 9


def test_another_shape_is_the_same_patient() -> None:
    coarse, fine = make_case(0, 5, (32, 48, 48)), make_case(0, 5, (64, 96, 96))
    for organ in SEVEN_ORGANS:
        if organ == "gallbladder":
            continue
        ratio = [np.count_nonzero(p.label == LABEL[organ]) * np.prod(p.spacing) for p in (coarse, fine)]
        assert ratio[0] == pytest.approx(ratio[1], rel=0.2), organ
        np.testing.assert_allclose(centre(coarse, organ) * 2 + 0.5, centre(fine, organ), atol=1.5)


@pytest.mark.parametrize(("seed", "index", "shape"), [(-1, 0, SMALL), (0, -1, SMALL), (0, 0, (15, 32, 32))])
def test_arguments_out_of_range_are_refused(seed: int, index: int, shape: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="phantom"):
        make_case(seed, index, shape)


def test_organs_lie_where_they_lie_in_a_patient(cases: list[Phantom]) -> None:
    for case in cases:
        at = {organ: centre(case, organ) for organ in SEVEN_ORGANS if (case.label == LABEL[organ]).any()}
        z, y, x = 0, 1, 2  # to superior, to posterior, to the left
        middle = case.label.shape[2] / 2
        assert at["liver"][x] < middle < at["spleen"][x]
        assert at["right_kidney"][x] < middle < at["left_kidney"][x]
        assert at["liver"][x] < at["stomach"][x]
        for kidney in ("left_kidney", "right_kidney"):
            assert at["liver"][z] > at[kidney][z] and at["spleen"][z] > at[kidney][z]
            assert at["stomach"][y] < at[kidney][y] and at["pancreas"][y] < at[kidney][y]
        assert at["right_kidney"][x] < at["pancreas"][x] < at["spleen"][x]
        if "gallbladder" in at:
            assert at["gallbladder"][x] < middle and at["gallbladder"][y] < at["right_kidney"][y]


def test_the_table_is_behind_and_the_gas_in_front(cases: list[Phantom]) -> None:
    for case in cases:
        stomach = case.label == LABEL["stomach"]
        gas = stomach & (case.image < -500)
        if np.count_nonzero(gas) > 20:
            assert np.argwhere(gas)[:, 1].mean() < np.argwhere(stomach)[:, 1].mean()
        bone = np.argwhere(case.image[:, :, 40:56] > 250)[:, 1]
        assert np.median(bone) > case.image.shape[1] / 2  # the spine


def test_volumes_are_plausible(cases: list[Phantom]) -> None:
    volumes: dict[str, list[float]] = {organ: [] for organ in SEVEN_ORGANS}
    for case in cases:
        for organ in SEVEN_ORGANS:
            voxels = np.count_nonzero(case.label == LABEL[organ])
            cut = any((case.label[end] == LABEL[organ]).any() for end in (0, -1))
            if voxels and not cut:
                volumes[organ].append(voxels * float(np.prod(case.spacing)) / 1000)
    # medians of DATA.md 1, within a factor of 1.6
    measured = {
        "liver": 1660,
        "gallbladder": 20,
        "spleen": 225,
        "left_kidney": 161,
        "right_kidney": 152,
        "pancreas": 85,
    }
    for organ, found in volumes.items():
        low, high = ORGANS[organ].volume_ml
        assert found and low <= min(found) and max(found) <= high, organ
        if organ in measured:
            assert measured[organ] / 1.6 < np.median(found) < measured[organ] * 1.6, organ
        assert max(found) > 1.15 * min(found), organ  # patients differ


def test_each_organ_is_one_piece(cases: list[Phantom]) -> None:
    for number, case in enumerate(cases):
        for organ in SEVEN_ORGANS:
            pieces, count = ndimage.label(case.label == LABEL[organ], np.ones((3, 3, 3)))
            if count:
                sizes = np.bincount(pieces.ravel())[1:]
                assert sizes.max() > 0.9 * sizes.sum(), (number, organ)


def test_hu_are_plausible_and_overlap_between_organs(cases: list[Phantom]) -> None:
    found = {
        organ: np.array([mean_hu(p, organ) for p in cases if (p.label == LABEL[organ]).any()]) for organ in SEVEN_ORGANS
    }
    for organ, means in found.items():
        low, high = ORGANS[organ].mean_hu
        assert (low - 20 < means).all() and (means < high + 20).all(), (organ, means)
    # portal-venous means of DATA.md 1
    for organ, target in {"liver": 90, "spleen": 96, "pancreas": 63, "gallbladder": 26}.items():
        assert abs(np.median(found[organ]) - target) < 20, organ
    assert np.ptp(found["right_kidney"]) > 30  # phases differ
    # no threshold separates these pairs over the cohort
    for first, second in (("liver", "spleen"), ("spleen", "right_kidney"), ("pancreas", "liver")):
        assert max(found[first].min(), found[second].min()) < min(found[first].max(), found[second].max())


def test_bowel_loops_look_like_pancreas_and_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with_loops = [make_case(0, index, (64, 96, 96)) for index in range(3)]
    painters = [(lambda *_: None) if paint is paint_small_bowel else paint for paint in phantom._PAINTERS]
    monkeypatch.setattr(phantom, "_PAINTERS", tuple(painters))
    for index, case in enumerate(with_loops):
        bowel = (case.image != make_case(0, index, (64, 96, 96)).image) & (case.label == 0)
        # local mean and deviation in a cube of 5 voxels, as a network without context would see them
        image = np.clip(case.image, -160, 300).astype(np.float32)
        mean = ndimage.uniform_filter(image, 5)
        spread = np.sqrt(np.maximum(ndimage.uniform_filter(image**2, 5) - mean**2, 0))
        pancreas = case.label == LABEL["pancreas"]
        low, high = np.quantile(mean[pancreas], [0.25, 0.75])
        calm, rough = np.quantile(spread[pancreas], [0.25, 0.75])
        alike = (mean > low) & (mean < high) & (spread > calm) & (spread < rough)
        assert np.count_nonzero(alike & bowel) > np.count_nonzero(alike & pancreas)


def test_coverage_varies_and_sometimes_cuts_organs(cases: list[Phantom]) -> None:
    top = [any((p.label[-1] == LABEL[organ]).any() for organ in ("liver", "spleen")) for p in cases]
    assert any(top) and not all(top)
    assert len({p.spacing for p in cases}) == len(cases)
    kidneys = [centre(p, "left_kidney")[0] * p.spacing[0] for p in cases]
    assert max(kidneys) - min(kidneys) > 40  # mm above the lowest slice


def test_some_patients_have_no_gallbladder_and_all_have_the_rest() -> None:
    labels = [np.bincount(make_case(0, index, SMALL).label.ravel(), minlength=8) for index in range(24)]
    missing = sum(counts[LABEL["gallbladder"]] == 0 for counts in labels)
    assert 1 <= missing <= 8
    for counts in labels:
        assert all(counts[value] for value, organ in PHANTOM_LABELS.items() if organ != "gallbladder")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), cases=8, seed=0, shape=SMALL)


def test_the_cohort_is_a_data_set_with_every_organ_annotated(cohort: Path) -> None:
    manifest = load_manifest(cohort)
    assert manifest.name == "phantom" and manifest.modality == "CT" and manifest.labels == PHANTOM_LABELS
    assert [case.id for case in manifest.cases] == [f"phantom_{index:03d}" for index in range(8)]
    assert all(case.annotated == frozenset(SEVEN_ORGANS) for case in manifest.cases)


def test_a_missing_gallbladder_is_annotated_and_absent(tmp_path: Path) -> None:
    seed = next(s for s in range(100) if not (make_case(s, 0, (32, 48, 48)).label == LABEL["gallbladder"]).any())
    (case,) = load_manifest(write_cohort(tmp_path, cases=1, seed=seed, shape=(32, 48, 48))).cases
    assert case.label is not None and "gallbladder" in case.annotated
    assert LABEL["gallbladder"] not in np.unique(np.asarray(nibabel.load(case.label).dataobj))


def test_files_hold_the_case_in_world_coordinates(cohort: Path) -> None:
    # nibabel alone, by world position: from the first voxel's, x falls to the left in RAS, y to posterior, z rises
    codes = set()
    for index, entry in enumerate(load_manifest(cohort).cases):
        case = make_case(0, index, SMALL)
        for path, expected in ((entry.image, case.image), (entry.label, case.label)):
            assert path is not None
            file = nibabel.load(path)
            codes.add("".join(nibabel.aff2axcodes(file.affine)))
            corners = nibabel.affines.apply_affine(file.affine, [[0, 0, 0], [n - 1 for n in file.shape]])
            start = np.array([corners[:, 0].max(), corners[:, 1].max(), corners[:, 2].min()])
            z, y, x = np.indices(SMALL)
            steps = np.stack([-x * case.spacing[2], -y * case.spacing[1], z * case.spacing[0]], -1)
            voxel = nibabel.affines.apply_affine(np.linalg.inv(file.affine), start + steps)
            assert np.abs(voxel - np.rint(voxel)).max() < 1e-2
            i, j, k = np.moveaxis(np.rint(voxel).astype(int), -1, 0)
            read = np.asarray(file.dataobj)
            np.testing.assert_array_equal(read[i, j, k], expected)
            assert read.dtype == expected.dtype
    assert codes == {"LAS", "RAS", "LPS"}


def test_the_files_do_not_depend_on_processes_nor_on_the_number_of_cases(cohort: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_cohort(tmp_path, cases=2, seed=0, shape=SMALL, processes=2, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]
    for path in sorted(tmp_path.rglob("*.nii.gz")):
        assert path.read_bytes() == (cohort.parent / path.relative_to(tmp_path)).read_bytes()


def test_the_folder_can_be_moved(cohort: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(cohort.parent, tmp_path / "elsewhere")
    assert all(case.image.is_relative_to(moved) for case in load_manifest(moved / "dataset.yaml").cases)


def test_a_cohort_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        write_cohort(tmp_path / "file", cases=1, seed=0, shape=SMALL)
    with pytest.raises(UsageError, match="cases 0"):
        write_cohort(tmp_path, cases=0, seed=0)
