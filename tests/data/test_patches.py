"""3D batches: where patches lie, what they show, and that nothing but (seed, step, position) decides it."""

import h5py
import numpy as np
import pytest
import torch
from synthetic import SPACING, make_cache, write_dataset

from organseg.data import PatchDataModule
from organseg.data.augment3d import PatchAugmentation
from organseg.data.module import ResumableLoader, WholeCases
from organseg.data.patches import PatchSamples, patch_start, showing
from organseg.data.pseudo_labels import PseudoLabels, RoundHeader, write_pseudo_labels
from organseg.data.sampling import StepSampler
from organseg.errors import UsageError

PATCH = (8, 16, 12)


def module(cache, **options) -> PatchDataModule:
    return PatchDataModule(cache, **{"batch_size": 4, "workers": 0, "patch_size": PATCH, **options})


@pytest.fixture(scope="module")
def data(prepared) -> PatchDataModule:
    return module(prepared, label_share=0.5, augmentation=None)


def every(samples: PatchSamples, steps: int = 10):
    return [((step, position), samples[step, position]) for step in range(steps) for position in range(4)]


def test_a_patch_without_augmentation_is_a_part_of_the_case(data):
    samples, normalisation = data.samples(), data.preprocessing.normalisation
    for _, sample in every(samples):
        case = next(case for case in data.cohort.train if case.key == sample["case"])
        image, label = case.cached.arrays().image, case.lookup[case.cached.arrays().label]
        start = (sample["index_to_mm"] @ (0, 0, 0, 1))[:3] / SPACING
        assert start == pytest.approx(np.round(start), abs=1e-4)
        part = tuple(slice(round(low), round(low) + n) for low, n in zip(start, PATCH, strict=True))
        assert sample["image"].shape == (1, *PATCH) and sample["image"].dtype == np.float32
        assert sample["image"][0] == pytest.approx(normalisation(image[part]), abs=1e-4)
        assert (sample["label"] == label[part]).all() and sample["label"].dtype == np.uint8
        assert (sample["annotated"] == case.known).all()


def test_what_was_drawn_for_an_organ_has_it_in_its_middle(data):
    samples = data.samples()
    shown = []
    for key, sample in every(samples, 20):
        draw = samples.plan.draw(*key)
        if draw.organ is None:
            continue
        assert sample["annotated"][draw.organ]
        assert (sample["label"] == draw.organ + 1).any()
        shown.append(draw.organ)
    assert set(shown) == set(range(4)) and len(shown) == 40


def test_augmentation_does_not_move_what_was_drawn_out_of_the_patch(prepared):
    """Organs reach the lowest slices, where the patch cannot have them in its middle."""
    samples = module(prepared, augmentation=PatchAugmentation(shift=0.4)).samples()
    size, moved = np.array(PATCH), 0
    for key, sample in every(samples, 60):
        draw = samples.plan.draw(*key)
        if draw.organ is None:
            continue
        voxel = samples._middle(draw)
        index = (np.linalg.inv(sample["index_to_mm"]) @ [*(voxel * SPACING), 1])[:3]
        assert (index > -0.501).all() and (index < size - 0.499).all()
        moved += bool((np.minimum(np.abs(index), np.abs(index - size + 1)) < 1e-3).any())
    assert moved > 10


def test_a_voxel_inside_moves_no_patch_and_one_beyond_as_far_as_it_must():
    turn, patch = np.diag([2.0, 0.5, 1.0, 1.0]), np.array([4, 6, 8])
    turn[:3, 3] = 10, 20, 30
    for inside in ([10, 20, 30], [16, 22, 37], [9, 20, 30], [17, 22, 37]):  # half a voxel beyond the first or last
        assert np.array_equal(showing(np.array(inside), turn, patch), turn)
    # Index 5 of 0..3 along z, -4 along y, 3 along x: two voxels of 2 and four of half a one beyond.
    moved = showing(np.array([20, 18, 33]), turn, patch)
    assert moved[:3, 3].tolist() == [10 + 4, 20 - 2, 30] and np.array_equal(moved[:3, :3], turn[:3, :3])


@pytest.mark.parametrize("augmentation", [None, PatchAugmentation()])
def test_no_more_of_a_case_is_read_than_a_patch_needs(prepared, monkeypatch, augmentation):
    samples = module(prepared, patch_size=(3, 6, 5), augmentation=augmentation).samples()
    read, given = [], h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset, "__getitem__", lambda dataset, part: (read.append(given(dataset, part)), read[-1])[1]
    )
    # One voxel more of each axis to interpolate; zoom and turns reach farther.
    most = 4 * 7 * 6 if augmentation is None else 7 * 11 * 10
    for step in range(10):
        for position in range(4):
            organ = samples.plan.draw(step, position).organ
            read.clear()
            _ = samples[step, position]
            *plane, image, label = read
            assert len(plane) == (0 if organ is None else 2)  # the slice in which a voxel is drawn
            assert all(part.shape == (1, 32, 32) for part in plane)
            assert 0 < image.size == label.size <= most < 12 * 32 * 32


@pytest.mark.parametrize("size", [(8, 16, 12), (30, 50, 40), (5, 40, 7)])
def test_index_to_mm_leads_to_what_augmentation_moved(prepared, size):
    data = module(prepared, patch_size=size, augmentation=PatchAugmentation(gain=(1, 1), offset=0))
    inside = 0
    for _, sample in every(data.samples(), 6):
        case = next(case for case in data.cohort.train if case.key == sample["case"])
        label = case.lookup[case.cached.arrays().label]
        index = np.argwhere(np.ones(size, bool))
        place = (np.c_[index, np.ones(len(index))] @ sample["index_to_mm"].T)[:, :3] / SPACING
        nearest = np.round(place).astype(int)
        sure = (np.abs(place - nearest) < 0.4).all(axis=1)
        within = ((nearest >= 0) & (nearest < label.shape)).all(axis=1)
        clipped = np.clip(nearest, 0, np.array(label.shape) - 1)
        expected = np.where(within, label[tuple(clipped.T)], 0)
        assert (sample["label"].ravel() == expected)[sure].all()
        inside += int((sure & within & (expected > 0)).sum())
    assert inside > 500


def test_a_case_smaller_than_the_patch_lies_in_its_middle(prepared):
    data = module(prepared, patch_size=(20, 40, 36), augmentation=None)
    (_, sample), *_ = every(data.samples(), 1)
    case = next(case for case in data.cohort.train if case.key == sample["case"])
    image = data.preprocessing.normalisation(case.cached.arrays().image)
    floor = data.preprocessing.normalisation.floor
    assert sample["image"][0, 4:16, 4:36, 2:34] == pytest.approx(image, abs=1e-4)
    assert sample["image"][0, :4] == pytest.approx(floor) and sample["image"][0, ..., 34:] == pytest.approx(floor)
    assert not sample["label"][16:].any()


def test_patch_start_by_hand():
    def start(middle, patch=4, shape=10):
        return int(patch_start(*(np.array([n]) for n in (middle, patch, shape)))[0])

    assert [start(m) for m in (0, 2, 5, 8, 9)] == [0, 0, 3, 6, 6]
    assert start(3, patch=10) == 0 and start(3, patch=13) == -1


def test_samples_do_not_depend_on_who_asks_in_which_order(prepared):
    data = module(prepared)
    forwards = dict(every(data.samples(), 3))
    again = data.samples()
    for key in reversed(forwards):
        for name in ("image", "label", "index_to_mm"):
            assert np.array_equal(again[key][name], forwards[key][name])
    other = module(prepared, seed=1).samples()
    assert any(not np.array_equal(other[key]["image"], forwards[key]["image"]) for key in forwards)


def test_workers_ranks_and_a_resumed_loader_deliver_the_same(prepared):
    data = module(prepared)

    def batches(workers=0, rank=0, world=1, start=0):
        loader = ResumableLoader(data.samples(), StepSampler(4, 4, rank, world), workers)
        loader.load_state_dict({"delivered": start})
        return [batch["image"] for batch in loader]

    whole = batches()
    assert whole[0].shape == (4, 1, *PATCH)
    assert all(torch.equal(*pair) for pair in zip(whole, batches(workers=2), strict=True))
    assert all(torch.equal(*pair) for pair in zip(whole[2:], batches(start=2), strict=True))
    for rank in range(2):
        part = batches(rank=rank, world=2)
        assert all(torch.equal(one, all_[rank::2]) for one, all_ in zip(part, whole, strict=True))


def test_pseudo_labels_fill_what_is_not_annotated(prepared, tmp_path):
    data = module(prepared, label_share=0.4, val_share=0.2, augmentation=None)
    plain = dict(every(data.samples(), 8))
    for key in data.case_keys("predict"):
        hidden = data.hidden_truth(key)
        zeros = np.zeros(hidden.shape, np.float32)
        header = RoundHeader(key, data.organs, 1, 1.0, "test", (0,) * 4, (0,) * 4)
        write_pseudo_labels(tmp_path, header, PseudoLabels(hidden, hidden, hidden, zeros, zeros))
    data.enter_phase(3, tmp_path)
    added = 0
    for _, sample in every(data.samples(), 8):
        case = next(case for case in data.cohort.train if case.key == sample["case"])
        start = np.round((sample["index_to_mm"] @ (0, 0, 0, 1))[:3] / SPACING).astype(int)
        part = tuple(slice(low, low + n) for low, n in zip(start, PATCH, strict=True))
        truth = case.cached.arrays().label[part]
        assert (sample["label"] == truth).all()  # everything is labelled now
        assert (sample["annotated"] == case.known).all()
        added += int((truth != case.lookup[truth]).sum())
    assert added > 100 and plain


def test_whole_cases_say_what_the_network_sees(data):
    assert WholeCases(data.cohort.test, data.preprocessing, on_source_grid=True)[0].window == PATCH


def test_each_mr_case_has_its_own_normalisation(tmp_path):
    dataset = write_dataset(tmp_path / "set", 5, head={"modality": "MR"})
    samples = module(make_cache(dataset, tmp_path / "cache")).samples()
    assert len({normalisation.mean for normalisation in samples.normalisations}) > 1
    assert np.isfinite(samples[0, 0]["image"]).all()


@pytest.mark.parametrize("options", [{"patch_size": (0, 4, 4)}, {"batch_size": 0}])
def test_impossible_options_are_refused(prepared, options):
    with pytest.raises(UsageError, match="must be"):
        module(prepared, **options)
