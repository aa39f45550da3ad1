"""Sliding windows: every voxel is seen, weights cancel, memory does not grow with the scan (METHOD.md 4)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.test_slicewise import CPU, case_of, most

from organseg.batch import View
from organseg.inference import segment_windows
from organseg.inference.windows import bell, window_starts


def windowed(image: np.ndarray, window, shape=None):
    case = case_of(image, shape)
    case.window = window
    return case


def one_hot(view: View) -> torch.Tensor:
    """[b, 1, D, H, W] of integers 0..3 -> probabilities [b, 4, D, H, W]."""
    return (view["image"] == torch.arange(4.0).view(1, 4, 1, 1, 1)).float()


@given(st.integers(1, 300), st.integers(1, 100), st.sampled_from([0.0, 0.25, 0.5, 0.75]))
@settings(max_examples=200, deadline=None)
def test_windows_cover_an_axis_with_the_overlap(length, window, overlap):
    window = min(window, length)
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0 and starts[-1] == length - window
    assert starts == sorted(set(starts))
    # Rounding of the starts may cost one voxel of the overlap.
    assert max(np.diff(starts), default=0) <= max(1, window * (1 - overlap)) + 1


@pytest.mark.parametrize("window", [(4, 3, 5), (7, 16, 16), (20, 20, 20), (1, 1, 1), (13, 9, 11)])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_a_network_that_sees_single_voxels_is_not_changed(window, overlap):
    labels = np.random.default_rng(0).integers(0, 4, (13, 9, 11)).astype(np.int16)
    preds = segment_windows(windowed(labels, window), one_hot, most, device=CPU, overlap=overlap)
    assert preds.dtype == np.uint8 and (preds == labels).all()


def test_the_weighted_mean_of_overlapping_windows_by_hand():
    seen = []

    def network(view: View) -> torch.Tensor:
        patch = view["image"]
        seen.append(patch[0, 0, :, 0, 0].tolist())
        return torch.full((1, 1, *patch.shape[2:]), float(len(seen)))

    kept = []
    image = np.arange(6, dtype=np.float32).reshape(6, 1, 1)
    segment_windows(
        windowed(image, (4, 1, 1)), network, most, device=CPU, keep=lambda _, probs: kept.append(probs.clone())
    )
    assert seen == [[0, 1, 2, 3], [2, 3, 4, 5]]
    inner, outer = (float(np.exp(-0.5 * (place / 0.5) ** 2)) for place in (0.5, 1.5))
    assert bell(4).tolist() == pytest.approx([outer, inner, inner, outer])
    both = [(1 * inner + 2 * outer) / (inner + outer), (1 * outer + 2 * inner) / (inner + outer)]
    assert torch.cat(kept).flatten().tolist() == pytest.approx([1, 1, *both, 2, 2])


@pytest.mark.parametrize("shape", [(13, 10, 9), (26, 10, 9), (7, 20, 5), (1, 10, 9)])
def test_equals_the_whole_volume_computed_at_once(shape):
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(1, 3, 1)

    def network(view: View) -> torch.Tensor:
        return conv(view["image"]).softmax(1)

    image = np.random.default_rng(1).normal(size=(13, 10, 9)).astype(np.float32)
    kept = []
    segment_windows(
        windowed(image, (6, 5, 9), shape), network, most, device=CPU, keep=lambda _, probs: kept.append(probs.clone())
    )
    with torch.no_grad():
        whole = conv(torch.from_numpy(image)[None, None]).softmax(1)
    expected = F.interpolate(whole, shape, mode="trilinear", align_corners=False)[0]
    assert torch.allclose(torch.cat(kept).transpose(0, 1), expected, atol=1e-5)


def test_a_short_case_is_seen_as_in_training_with_air_around():
    seen = []

    def network(view: View) -> torch.Tensor:
        seen.append(view["image"].clone())
        return one_hot(view)

    labels = np.random.default_rng(2).integers(1, 4, (3, 9, 4)).astype(np.int16)
    case = windowed(labels, (6, 5, 4))
    case.floor = -7.0
    assert (segment_windows(case, network, most, device=CPU) == labels).all()
    assert {tuple(patch.shape[2:]) for patch in seen} == {(6, 5, 4)}
    # As `patch_start` puts it: of three slices that lack, one before and two after.
    assert (seen[0][0, 0, [0, 4, 5]] == -7).all() and (seen[0][0, 0, 1:4] > 0).all()


def test_what_is_held_does_not_grow_with_the_length_of_the_scan(monkeypatch):
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **more: made.append(size) or zeros(*size, **more))
    for length in (20, 200):
        segment_windows(windowed(np.zeros((length, 6, 5), np.float32), (8, 4, 4)), one_hot, most, device=CPU)
    volumes = [size for size in made if len(size) == 4]
    assert volumes == [(8, 4, 6, 5)] * 2


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_what_is_held_is_not_copied_as_a_whole(monkeypatch, overlap):
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: copied.append(tensor.ndim) or clone(tensor))
    labels = np.random.default_rng(3).integers(0, 4, (23, 6, 5)).astype(np.int16)
    preds = segment_windows(windowed(labels, (8, 4, 4)), one_hot, most, device=CPU, overlap=overlap)
    assert (preds == labels).all() and 4 not in copied


@pytest.mark.parametrize("window", [(4, 3, 5), (20, 16, 16)])
def test_the_network_is_told_where_its_windows_lie(window):
    """Each voxel's value is its own index: what the network is told must say the same."""
    shape, spacing = (13, 9, 11), (3.0, 0.5, 2.0)
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    def look(view: View) -> torch.Tensor:
        patch = view["image"]
        index = torch.stack(torch.meshgrid(*map(torch.arange, patch.shape[2:]), indexing="ij"), dim=-1).float()
        mm = index @ view["index_to_mm"][0, :3, :3].T + view["index_to_mm"][0, :3, 3]
        z, y, x = (mm / torch.tensor(spacing)).round().long().unbind(-1)
        inside = patch[0, 0] >= 0
        assert inside.sum() == min(inside.numel(), image.size)
        assert torch.equal(patch[0, 0][inside], ((z * 9 + y) * 11 + x)[inside].float())
        return patch.expand(-1, 2, -1, -1, -1)

    case = windowed(image, window)
    case.spacing, case.floor = spacing, -1.0
    segment_windows(case, look, most, device=CPU)
