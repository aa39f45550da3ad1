"""Batches (DESIGN.md section 2), their order, and that a loader goes on exactly where it stopped."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from synthetic import LABELS, SPACING, make_cache, make_case, write_dataset

from organseg.data import SliceDataModule
from organseg.data.augment import SliceAugmentation
from organseg.data.module import ResumableLoader, WholeCases, slice_tables
from organseg.data.sampling import StepSampler
from organseg.data.slices import SliceSamples, index_to_mm
from organseg.errors import UsageError
from organseg.volumes import WorkingGrid

PLAIN = SliceAugmentation(gain=(1, 1), offset=0)


def module(cache: Path, **options) -> SliceDataModule:
    return SliceDataModule(cache, **{"batch_size": 6, "workers": 0, **options})


def samples_of(data: SliceDataModule, augmentation: SliceAugmentation | None = None) -> SliceSamples:
    return SliceSamples(data.cohort.train, data.plan(), data.preprocessing, augmentation)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(torch.nan_to_num(one[k], -1e9), torch.nan_to_num(other[k], -1e9))
        if isinstance(one[k], torch.Tensor)
        else one[k] == other[k]
        for k in one
    )


@pytest.fixture(scope="module")
def data(prepared) -> SliceDataModule:
    return module(prepared, label_share=0.5)


def test_slice_tables_by_hand(data):
    cases = data.cohort.train
    slices, by_organ = slice_tables(cases)
    assert slices.tolist() == [[number, z] for number in range(len(cases)) for z in range(12)]
    expected = []
    for k, organ in enumerate(data.organs, start=1):
        rows = []
        for number, case in enumerate(cases):
            shows = (case.cached.arrays().label == k).any(axis=(1, 2))
            rows += [[number, z] for z in np.flatnonzero(shows) if organ in case.annotated]
        expected.append(rows)
    found = {channel: table.tolist() for channel, table in by_organ.items()}
    assert found == {channel: rows for channel, rows in enumerate(expected) if rows}
    assert min(map(len, by_organ.values())) > 0


def test_an_organ_that_nobody_shows_has_no_table(prepared):
    cohort = module(prepared, label_share=0.0).cohort
    assert slice_tables(cohort.train)[1] == {}
    assert module(prepared, label_share=0.0).plan().walked == 6


def test_a_sample_without_augmentation_is_the_slice_itself(data):
    samples, plan = samples_of(data), data.plan()
    for step in range(10):
        for position in range(6):
            sample, draw = samples[step, position], plan.draw(step, position)
            case = data.cohort.train[draw.case]
            image, label = make_case(int(case.key[-1]))
            assert sample["case"] == case.key
            clipped = np.clip(image[draw.z], -160, 300).astype(np.float64)
            normalisation = data.preprocessing.normalisation
            assert sample["image"][0] == pytest.approx((clipped - normalisation.mean) / normalisation.std, abs=1e-5)
            expected = np.zeros_like(label[draw.z])
            for value, organ in LABELS.items():
                if organ in case.annotated:
                    expected[label[draw.z] == value] = data.organs.index(organ) + 1
            assert (sample["label"] == expected).all()
            assert (sample["annotated"] == case.known).all()
            assert sample["index_to_mm"] @ (0, 3, 5, 1) == pytest.approx((draw.z * 10, 3 * 9, 5 * 8, 1))
            assert sample["image"].dtype == np.float32 and sample["index_to_mm"].dtype == np.float32


def test_normalisation_is_that_of_all_clipped_voxels_of_the_training_cases(data):
    voxels = np.concatenate([make_case(int(case.key[-1]))[0].ravel() for case in data.cohort.train])
    clipped = np.clip(voxels, -160, 300).astype(np.float64)
    found = data.preprocessing.normalisation
    assert found.window == (-160, 300)
    assert found.mean == pytest.approx(clipped.mean())
    assert found.std == pytest.approx(clipped.std())


def test_half_of_a_batch_is_drawn_from_cases_that_annotate_what_they_show(data):
    samples = samples_of(data)
    for step in range(20):
        for position in range(3, 6):
            sample = samples[step, position]
            shown = set(np.unique(sample["label"])) - {0, 255}
            assert shown
            assert all(sample["annotated"][k - 1] for k in shown)


def test_samples_do_not_depend_on_who_asks_in_which_order(data):
    one, other = samples_of(data, SliceAugmentation()), samples_of(data, SliceAugmentation())
    keys = [(step, position) for step in range(4) for position in range(6)]
    forwards = {key: one[key] for key in keys}
    for key in reversed(keys):
        again = other[key]
        for name in ("image", "label", "index_to_mm"):
            assert np.array_equal(forwards[key][name], again[name])


@pytest.mark.parametrize("size", [None, 24])
def test_index_to_mm_finds_the_mm_of_what_augmentation_moved(tmp_path, size):
    dataset = write_dataset(tmp_path / "set", 5, shape=(6, 64, 64))
    data = module(make_cache(dataset, tmp_path / "cache", WorkingGrid(size)), val_share=0, organs=["liver", "spleen"])
    moved, still = samples_of(data, PLAIN), samples_of(data)
    # Of the whole file: 64 pixels of 9 and 8 mm, whatever size the cache has.
    extent = np.array([64 * 9, 64 * 8])
    checked = 0
    for step in range(12):
        for position in range(6):
            before, after = still[step, position], moved[step, position]
            pixel_mm = max(extent / before["label"].shape)
            for k in (1, 2):
                old, new = before["label"] == k, after["label"] == k
                edge = np.concatenate([new[0], new[-1], new[:, 0], new[:, -1]])
                if old.sum() < 60 or edge.any():  # partly out of sight
                    continue
                where = [np.append(0, np.append(np.argwhere(mask).mean(0), 1)) for mask in (old, new)]
                in_mm = [sample["index_to_mm"] @ at for sample, at in zip((before, after), where, strict=True)]
                assert in_mm[0] == pytest.approx(in_mm[1], abs=pixel_mm / 2)
                checked += 1
    assert checked > 20


def test_index_to_mm_of_a_known_matrix_by_hand():
    # (x, y) -> (2 x + 3, 2 y - 1): pixel (column 13, row 9) shows what was at column 5, row 5.
    after = np.array([[2.0, 0, 3], [0, 2, -1], [0, 0, 1]])
    matrix = index_to_mm(after, z=4, spacing=(5.0, 0.5, 0.25))
    assert matrix @ (0, 9, 13, 1) == pytest.approx((20, 2.5, 1.25, 1))
    assert matrix @ (1, 9, 13, 1) == pytest.approx((25, 2.5, 1.25, 1))  # one slice on
    # A turn by 90 degrees, x to y: (x, y) -> (-y, x).
    matrix = index_to_mm(np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), z=0, spacing=(1.0, 2.0, 3.0))
    assert matrix @ (0, 7, -4, 1) == pytest.approx((0, 4 * 2, 7 * 3, 1))


def test_centres_are_where_index_to_mm_leads(data):
    cases = {case.key: case for case in data.cohort.train}
    sample = samples_of(data)[0, 0]
    assert np.array_equal(sample["centre"], cases[sample["case"]].centres(), equal_nan=True)
    assert np.isnan(sample["centre"]).any(axis=1).tolist() == (~sample["annotated"]).tolist()


def loader(data: SliceDataModule, steps: int = 5, workers: int = 0, rank: int = 0, world: int = 1) -> ResumableLoader:
    sampler = StepSampler(steps, data.batch_size, rank, world)
    return ResumableLoader(samples_of(data, SliceAugmentation()), sampler, workers)


def test_a_batch_has_the_shapes_and_types_of_the_contract(data):
    (batch, *_) = loader(data, steps=1)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items() if name != "case"}
    assert shapes == {
        "image": ((6, 1, 32, 32), torch.float32),
        "label": ((6, 32, 32), torch.uint8),
        "annotated": ((6, 4), torch.bool),
        "index_to_mm": ((6, 4, 4), torch.float32),
        "centre": ((6, 4, 3), torch.float32),
    }
    assert len(batch["case"]) == 6 and all(case.startswith("tiny/case") for case in batch["case"])


def test_a_loader_resumes_at_any_batch(data):
    whole = list(loader(data))
    assert len(whole) == len(loader(data)) == 5
    for stop in range(6):
        first = loader(data)
        batches = iter(first)
        for number in range(stop):
            next(batches)
            assert first.state_dict() == {"delivered": number + 1}
        second = loader(data)
        second.load_state_dict(first.state_dict())
        rest = list(second)
        assert len(rest) == 5 - stop
        assert all(same(one, other) for one, other in zip(rest, whole[stop:], strict=True))
        assert second.state_dict() == {"delivered": 5}


def test_a_loader_does_not_move_the_global_generator(data):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    list(loader(data, steps=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_two_workers_give_the_same_batches_and_resume_too(data):
    whole = list(loader(data, steps=6))
    ahead = loader(data, steps=6, workers=2)
    batches = iter(ahead)
    assert all(same(next(batches), expected) for expected in whole[:2])
    assert ahead.state_dict() == {"delivered": 2}  # not the four that wait in the workers
    del batches
    rest = loader(data, steps=6, workers=2)
    rest.load_state_dict(ahead.state_dict())
    assert all(same(one, expected) for one, expected in zip(rest, whole[2:], strict=True))


def test_two_ranks_deliver_the_parts_of_one_batch(data):
    whole = next(iter(loader(data, steps=1)))
    ranks = [next(iter(loader(data, steps=1, rank=rank, world=2))) for rank in range(2)]
    for rank, part in enumerate(ranks):
        assert torch.equal(part["image"], whole["image"][rank::2])
        assert part["case"] == whole["case"][rank::2]


def trained(data: SliceDataModule, **options) -> SliceDataModule:
    data.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **options)
    return data


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_module_counts_steps(prepared):
    data = trained(module(prepared), max_steps=7, accumulate_grad_batches=2)
    assert len(data.train_dataloader()) == 14
    with pytest.raises(UsageError, match="max_steps"):
        trained(module(prepared), max_epochs=1).train_dataloader()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whole_cases_for_validation_and_test(tmp_path):
    dataset = write_dataset(tmp_path / "set", 5)
    data = trained(module(make_cache(dataset, tmp_path / "cache", WorkingGrid(16)), label_share=0.5), max_steps=1)
    (validated,) = data.val_dataloader()
    (tested,) = data.test_dataloader()
    assert [validated.key] == list(data.case_keys("validate"))
    assert [tested.key] == list(data.case_keys("test"))
    assert validated.shape == validated.image.shape == (12, 16, 16)
    assert validated.spacing == pytest.approx((10, 18, 16))
    # Tested on the file's own grid, with all labels.
    label = make_case(int(tested.key[-1]))[1]
    assert tested.image.shape == (12, 16, 16)
    assert (tested.shape, tested.spacing) == ((12, 32, 32), SPACING)
    assert (tested.truth == np.select([label == value for value in sorted(LABELS)], range(1, 5))).all()
    assert tested.annotated.all() and tested.number == 0
    assert (tested.affine == data.cohort.test[0].cached.header.affine).all()
    known = data.cohort.val[0].known
    assert (validated.annotated == known).all()
    assert set(np.unique(validated.truth)) - {0} <= set(1 + np.flatnonzero(known))
    slab = validated.normalise(validated.image[:2])
    assert slab.dtype == np.float32 and slab.shape == (2, 16, 16)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nobody_validates_where_the_share_is_zero(prepared):
    data = trained(module(prepared, val_share=0), max_steps=1)
    assert list(data.val_dataloader()) == []
    assert len(data.cohort.train) == 8


def test_a_cache_of_a_spacing(tmp_path):
    dataset = write_dataset(tmp_path / "set", 5)
    grid = WorkingGrid(spacing=(10.0, 18.0, 16.0))
    data = module(make_cache(dataset, tmp_path / "cache", grid))
    assert data.preprocessing.grid == grid


def test_caches_of_two_grids_do_not_mix(tmp_path):
    make_cache(write_dataset(tmp_path / "one", 3, name="one"), tmp_path / "cache", WorkingGrid(16))
    make_cache(write_dataset(tmp_path / "two", 3, name="two", seed=9), tmp_path / "cache")
    with pytest.raises(UsageError, match=r"different grids \(.*: .*; .*: .*\); name some in data.init_args.datasets"):
        module(tmp_path / "cache")


def test_each_mr_case_has_its_own_normalisation(tmp_path):
    dataset = write_dataset(tmp_path / "set", 5, head={"modality": "MR"})
    data = module(make_cache(dataset, tmp_path / "cache"))
    assert data.preprocessing.normalisation is None
    samples = samples_of(data, SliceAugmentation())
    assert len({normalisation.mean for normalisation in samples.normalisations}) == len(data.cohort.train)
    whole = WholeCases(data.cohort.train, data.preprocessing, on_source_grid=False)[0]
    normal = whole.normalise(whole.image)
    assert normal.mean() == pytest.approx(0, abs=1e-4) and normal.std() == pytest.approx(1, abs=1e-3)
    assert samples[0, 0]["image"].shape == (1, 32, 32)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"workers": -1}, {"window_hu": (300.0, -160.0)}, {"window_hu": (1.0, 1.0)}]
)
def test_impossible_options_are_refused(prepared, options):
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        module(prepared, **options)


def test_a_test_data_set_leaves_no_trace_in_training(tmp_path):
    cache = tmp_path / "cache"
    for name, seed in (("one", 0), ("two", 20), ("held", 40), ("other", 60)):
        make_cache(write_dataset(tmp_path / name, 3, name=name, seed=seed), cache)
    sets = [
        module(cache, datasets=["one", "two"], test_datasets=[held], val_share=0.3, label_share=0.5)
        for held in ("held", "other")
    ]
    assert [data.case_keys("test")[0] for data in sets] == ["held/case0", "other/case0"]
    assert sets[0].preprocessing == sets[1].preprocessing
    assert sets[0].case_keys("validate") == sets[1].case_keys("validate")
    assert not any(key.startswith(("held", "other")) for data in sets for key in data.case_keys("predict"))
    first, second = map(samples_of, sets)
    for step in range(3):
        for position in range(6):
            one, other = first[step, position], second[step, position]
            assert one["case"] == other["case"]
            assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in one if name != "case")


def test_slices_of_two_sizes_make_no_batch(tmp_path):
    cache = make_cache(write_dataset(tmp_path / "one", 3, name="one"), tmp_path / "cache")
    wide = write_dataset(tmp_path / "two", ["w0", "w1", "w2"], name="two", shape=(12, 32, 40), seed=7)
    data = module(make_cache(wide, cache), val_share=0.0)
    with pytest.raises(UsageError, match=r"one/case\d \(32 x 32\) and two/w\d \(32 x 40\).*--size"):
        samples_of(data)
