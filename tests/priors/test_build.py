"""Algorithm 3 on volumes drawn by hand (METHOD.md 2.1)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organseg.priors import build_prior, cropped, smoothed
from organseg.priors.build import binned, bounding_box


def mask_of(shape, *boxes):
    mask = np.zeros(shape, bool)
    for box in boxes:
        mask[tuple(slice(low, high) for low, high in box)] = True
    return mask


def test_one_box_is_a_prior_of_ones():
    prior = build_prior([mask_of((9, 9, 9), ((2, 7), (1, 4), (3, 8)))], bins=5)
    assert prior.shape == (5, 3, 5) and prior.dtype == np.float32 and (prior == 1).all()


def test_a_staircase_is_binned_from_below():
    # Slices 0..3 with 1..4 columns; two bins of two slices each.
    mask = mask_of((6, 5, 6), *(((z, z + 1), (1, 2), (0, z + 1)) for z in range(4)))
    expected = [[[1, 0.5, 0, 0]], [[1, 1, 1, 0.5]]]
    assert build_prior([mask], bins=2).tolist() == expected
    assert build_prior([mask], bins=1).tolist() == [[[1, 0.75, 0.5, 0.25]]]
    each = build_prior([mask], bins=99)
    assert each.tolist() == [[[float(x <= z) for x in range(4)]] for z in range(4)]


def test_slices_are_shared_among_bins_that_do_not_divide_them():
    # dz = 5, B = 2: slices 0, 1, 2 go to bin 0 and 3, 4 to bin 1.
    mask = mask_of((5, 1, 2), ((0, 5), (0, 1), (0, 1)), ((2, 4), (0, 1), (1, 2)))
    assert build_prior([mask], bins=2).tolist() == [[[1, pytest.approx(1 / 3)]], [[1, 0.5]]]


def test_smaller_cases_are_centred_in_the_largest_extent_of_each_axis():
    tall, wide = mask_of((9, 9, 9), ((0, 5), (4, 5), (4, 5))), mask_of((9, 9, 9), ((3, 4), (0, 1), (2, 9)))
    prior = build_prior([tall, wide], bins=5)
    assert prior.shape == (5, 1, 7)
    expected = np.zeros((5, 1, 7))
    expected[:, 0, 3] += 0.5
    expected[2, 0, :] += 0.5
    assert (prior == expected).all()


def test_half_a_voxel_goes_down():
    two, three = mask_of((1, 1, 9), ((0, 1), (0, 1), (4, 6))), mask_of((1, 1, 9), ((0, 1), (0, 1), (1, 4)))
    # The box of 3 starts at floor((4 + 6 - 3) / 2) = 3 for the mask of 2: one voxel before it.
    assert build_prior([two, three], bins=1).tolist() == [[[0.5, 1, 1]]]


def test_outside_of_the_image_there_is_nothing():
    at_the_border, large = mask_of((4, 4, 4), ((0, 1), (0, 1), (0, 1))), mask_of((4, 4, 4), ((0, 3), (0, 3), (0, 3)))
    prior = build_prior([at_the_border, large], bins=3)
    assert prior[1, 1, 1] == 1 and prior.sum() == pytest.approx(1 + 26 / 2)


@given(st.integers(0, 10**6), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_as_the_algorithm_is_written(seed, bins):
    """Word by word: crop, add up, divide by the number of slices."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 8, 3)
    masks = [rng.random(shape) < 0.3 for _ in range(rng.integers(1, 4))]
    masks = [mask if mask.any() else np.ones(shape, bool) for mask in masks]
    boxes = [bounding_box(mask) for mask in masks]
    size = [max(int(high[axis] - low[axis]) for low, high in boxes) for axis in range(3)]
    used = min(bins, size[0])
    sums, slices = np.zeros((used, *size[1:])), [0] * used
    for mask, (low, high) in zip(masks, boxes, strict=True):
        start = [int(np.floor((a + b - n) / 2)) for a, b, n in zip(low, high, size, strict=True)]
        for i in range(size[0]):
            place = int(np.floor(used * i / size[0]))
            slices[place] += 1
            for y in range(size[1]):
                for x in range(size[2]):
                    at = (start[0] + i, start[1] + y, start[2] + x)
                    if all(0 <= index < n for index, n in zip(at, shape, strict=True)):
                        sums[place, y, x] += mask[at]
    np.testing.assert_allclose(build_prior(masks, bins), sums / np.array(slices)[:, None, None], rtol=1e-6)


def test_cropping_the_masks_first_changes_nothing():
    rng = np.random.default_rng(0)
    masks = [rng.random((9, 8, 7)) < 0.05 for _ in range(3)]
    small = [mask[tuple(slice(a, b) for a, b in zip(*bounding_box(mask), strict=True))] for mask in masks]
    assert (build_prior(masks, 3) == build_prior(small, 3)).all()


def test_crops_reach_beyond_the_array():
    array = np.arange(1, 4)[None, None]
    box = (np.array([0, 0, 1]), np.array([1, 1, 2]))
    assert cropped(array, np.array([1, 1, 5]), box).tolist() == [[[0, 1, 2, 3, 0]]]
    far = (np.array([0, 0, 50]), np.array([1, 1, 51]))
    assert cropped(array, np.array([1, 1, 3]), far).tolist() == [[[0, 0, 0]]]


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="0 masks"):
        build_prior([])
    with pytest.raises(ValueError, match="got 0"):
        build_prior([np.ones((1, 1, 1), bool)], bins=0)
    with pytest.raises(ValueError, match="no voxel"):
        build_prior([np.zeros((2, 2, 2), bool)])


def test_a_blur_keeps_the_volume_and_grows_the_box_in_the_plane():
    slices = build_prior([mask_of((9, 9, 9), ((2, 7), (2, 7), (2, 7)))], bins=5)
    blurred = smoothed(slices, (1.0, 0.5, 2.0))
    assert blurred.shape == (5, 7, 13)
    assert blurred.sum() == pytest.approx(slices.sum(), rel=0.03)
    assert blurred[2, 3, 6] == pytest.approx(blurred.max()) and 0 < blurred[2, 3, 0] < blurred[2, 3, 6] < 1
    # The organ's lowest and highest slices are not thinned out by empty ones beyond.
    assert (np.ptp(blurred, axis=0) < 1e-6).all()
    assert (smoothed(slices, (0.0, 0.0, 0.0)) == slices).all()


def test_bins_are_means_of_their_slices():
    slices = np.arange(5, dtype=np.float32)[:, None, None]
    assert binned(slices, 2).ravel().tolist() == [1, 3.5] and binned(slices, 9).ravel().tolist() == [0, 1, 2, 3, 4]
