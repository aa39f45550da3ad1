import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from organseg.volumes import linear_weights, resample_image, resample_label, resampled_affine

SIZES = st.integers(1, 40)


def torch_weights(n_in: int, n_out: int) -> np.ndarray:
    identity = torch.eye(n_in, dtype=torch.float64)[None, None]
    options = dict(mode="bilinear", align_corners=False, antialias=True)
    return torch.nn.functional.interpolate(identity, size=(n_out, n_in), **options)[0, 0].numpy()


@settings(max_examples=80, deadline=None)
@given(n_in=SIZES, n_out=SIZES)
def test_weights_are_those_of_torch(n_in, n_out):
    weights = linear_weights(n_in, n_out)
    assert weights.dtype == np.float32
    assert np.abs(weights - torch_weights(n_in, n_out)).max() < 1e-6
    assert np.abs(weights.sum(axis=1) - 1).max() < 1e-6


def test_weights_by_hand():
    assert linear_weights(3, 3).tolist() == np.eye(3).tolist()
    assert linear_weights(2, 4).tolist() == [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    # Shrinking by 2: a triangle of half width 2 around 1 and 3; at the edge what lies outside is left out.
    sevenths = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    assert linear_weights(4, 2) == pytest.approx(sevenths)
    assert linear_weights(1, 3).tolist() == [[1], [1], [1]]


@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), new=st.tuples(*[st.integers(1, 12)] * 3), seed=st.integers(0, 99))
def test_image_is_weighted_along_each_axis(shape, new, seed):
    image = np.random.default_rng(seed).normal(0, 500, shape).astype(np.float32)
    matrices = [torch_weights(*sizes) for sizes in zip(shape, new, strict=True)]
    expected = np.einsum("az,by,cx,zyx->abc", *matrices, image.astype(np.float64))
    result = resample_image(image, new)
    assert (result.dtype, result.shape) == (np.float32, new)
    assert np.abs(result - expected).max() < 1e-2
    whole = image.astype(np.int16)
    expected = np.einsum("az,by,cx,zyx->abc", *matrices, whole.astype(np.float64))
    result = resample_image(whole, new)
    assert result.dtype == np.int16
    assert np.abs(result - expected).max() < 0.51


def test_image_of_the_same_shape_is_a_copy():
    image = np.random.default_rng(0).integers(-1000, 3000, (3, 4, 5)).astype(np.int16)
    result = resample_image(image, (3, 4, 5))
    assert (result == image).all()
    assert not np.shares_memory(result, image)


def test_extreme_hu_do_not_overflow():
    for value in (-32768, 32767):
        image = np.full((3, 50, 50), value, np.int16)
        assert (resample_image(image, (2, 7, 91)) == value).all()


def test_flipped_views_are_resampled_like_copies():
    image = np.random.default_rng(0).integers(-1000, 3000, (6, 7, 8)).astype(np.int16)[::-1, ::-1]
    assert (resample_image(image, (3, 5, 4)) == resample_image(image.copy(), (3, 5, 4))).all()
    label = (image % 3).astype(np.uint8)
    assert (resample_label(label[:, :, ::-1], (3, 5, 4)) == resample_label(label[:, :, ::-1].copy(), (3, 5, 4))).all()


def test_growing_an_image_takes_no_more_than_a_few_slices_beside_the_result():
    image = np.zeros((60, 32, 32), np.int16)
    tracemalloc.start()
    try:
        result = resample_image(image, (60, 256, 256))
        assert tracemalloc.get_traced_memory()[1] < result.nbytes + 6 * 4 * 256 * 256
    finally:
        tracemalloc.stop()


def brute_force(label, new) -> tuple[np.ndarray, np.ndarray]:
    """Resampled labels by whole float64 volumes; and where rounding cannot have decided."""
    matrices = [torch_weights(*sizes) for sizes in zip(label.shape, new, strict=True)]
    values = np.union1d(label, [0])
    shares = np.stack([np.einsum("az,by,cx,zyx->abc", *matrices, (label == value) * 1.0) for value in values])
    behind = shares.max(axis=0) - shares
    winner = values[(behind < 5e-6).argmax(axis=0)]  # the lowest among equals
    return winner, ~((behind > 5e-6) & (behind < 3e-5)).any(axis=0)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    new=st.tuples(*[st.integers(1, 12)] * 3),
    seed=st.integers(0, 99),
    values=st.sampled_from([[0, 3], [0, 0, 0, 1, 2, 255], [1, 2, 3, 4, 5], [0, 0, 0, 0, 13], [7]]),
)
def test_label_takes_the_largest_share(shape, new, seed, values):
    label = np.random.default_rng(seed).choice(values, shape).astype(np.uint8)
    expected, clear = brute_force(label, new)
    result = resample_label(label, new)
    assert (result.dtype, result.shape) == (np.uint8, new)
    assert (result[clear] == expected[clear]).all()
    assert clear.any()


@pytest.mark.parametrize(("pair", "winner"), [((1, 2), 1), ((2, 1), 1), ((0, 3), 0), ((3, 0), 0), ((255, 4), 4)])
def test_ties_go_to_the_lower_value(pair, winner):
    label = np.array([[pair]], np.uint8)
    assert resample_label(label, (1, 1, 1)).item() == winner
    assert resample_label(label.reshape(2, 1, 1), (1, 1, 1)).item() == winner


def test_rounding_does_not_decide_a_tie():
    # Shares of seven voxels: not exact in binary, so equal sums differ in their last bits.
    for n_in in range(2, 60):
        row = np.full(n_in, 4, np.uint8)
        row[: n_in // 2], row[n_in - n_in // 2 :] = 9, 6
        row[n_in // 2 : n_in - n_in // 2] = 0
        label = np.broadcast_to(row, (7, 3, n_in))
        assert resample_label(label, (1, 1, 1)).item() == (6 if n_in > 3 or n_in == 2 else 0)


def test_label_of_the_same_shape_is_a_copy():
    label = np.random.default_rng(0).choice([0, 1, 255], (3, 4, 5)).astype(np.uint8)
    result = resample_label(label, (3, 4, 5))
    assert (result == label).all()
    assert not np.shares_memory(result, label)


def test_an_organ_keeps_its_place_and_volume():
    label = np.zeros((20, 40, 40), np.uint8)
    label[4:12, 8:24, 16:32] = 2
    result = resample_label(label, (20, 20, 10))
    expected = np.zeros((20, 20, 10), np.uint8)
    expected[4:12, 4:12, 4:8] = 2
    assert (result == expected).all()
    back = resample_label(result, label.shape)
    # Edges of the box lose their outermost line of voxels: there background covers more than half.
    assert 2 * np.count_nonzero((back == 2) & (label == 2)) / (np.count_nonzero(back) + np.count_nonzero(label)) > 0.97


def test_a_resampled_array_covers_the_same_field_of_view():
    index_to_mm = np.diag([3.0, 1.0, 2.0, 1.0])
    index_to_mm[:3, 3] = (10, 20, 30)
    result = resampled_affine(index_to_mm, (4, 6, 8), (2, 6, 16))
    # Voxel 0 of the halved axis is the middle of the old voxels 0 and 1; of the doubled one a quarter voxel lower.
    assert result.tolist() == [[6, 0, 0, 11.5], [0, 1, 0, 20], [0, 0, 1, 29.5], [0, 0, 0, 1]]


@pytest.mark.parametrize("n_out", [24, 31, 6, 4])
def test_positions_follow_the_values(n_out):
    # An image whose value is its own z position: after resampling the value is still the position, edges apart.
    shape, new = (12, 5, 5), (n_out, 5, 5)
    index_to_mm = np.diag([2.0, 1.0, 1.0, 1.0])
    image = np.broadcast_to(np.arange(12, dtype=np.float32)[:, None, None] * 2, shape)
    after = resampled_affine(index_to_mm, shape, new)
    positions = after[0, 0] * np.arange(n_out) + after[0, 3]
    inner = slice(3, -3) if n_out > 12 else slice(1, -1)
    assert resample_image(image, new)[inner, 2, 2] == pytest.approx(positions[inner], abs=1e-4)
