"""All translations by FFT are the scan's answer (METHOD.md 2.3)."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organseg.priors import align


def scan(probs, reference, max_shift, eps=1e-6):
    """The definition: every translation in turn, voxels beyond the array eps."""
    most = np.broadcast_to(max_shift, 3)
    padded = np.pad(probs.astype(np.float64), [(m, m) for m in most], constant_values=0)
    padded = np.clip(padded, eps, 1 - eps)
    best = None
    for shift in product(*(range(-m, m + 1) for m in most)):
        there = tuple(slice(m - t, m - t + n) for m, t, n in zip(most, shift, probs.shape, strict=True))
        moved = padded[there]
        score = np.where(reference, np.log(moved), np.log1p(-moved)).sum()
        key = (-round(score, 7), sum(t * t for t in shift), shift)
        best = min(best, key) if best else key
    return best[2]


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_equals_the_scan_on_random_volumes(seed):
    rng = np.random.default_rng(seed)
    shape, most = rng.integers(1, 7, 3), rng.integers(0, 4, 3)
    probs, reference = rng.random(shape), rng.random(shape) < rng.random()
    assert align(probs, reference, most) == scan(probs, reference, most)


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_equals_the_scan_where_many_translations_are_equal(seed, most):
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 6, 3)
    probs, reference = (rng.random(shape) < 0.3).astype(np.float32), rng.random(shape) < 0.3
    assert align(probs, reference, most) == scan(probs, reference, most)


def test_finds_how_an_organ_was_moved():
    rng = np.random.default_rng(0)
    organ = np.zeros((20, 24, 28), bool)
    organ[6:12, 8:15, 10:19] = rng.random((6, 7, 9)) < 0.8
    for shift in ((0, 0, 0), (3, -4, 2), (-5, 5, -5)):
        moved = np.roll(organ, tuple(-t for t in shift), axis=(0, 1, 2)) * 0.9 + 0.05
        assert align(moved, organ, 5) == shift


def test_a_stray_piece_does_not_move_it():
    reference = np.zeros((16, 16, 16), bool)
    reference[5:11, 5:11, 5:11] = True
    probs = np.where(reference, 0.9, 0.01)
    probs[1, 1, 1:15] = 0.95
    assert align(probs, reference, 6) == (0, 0, 0)


def test_of_equal_ones_the_shortest_then_the_first():
    flat = np.full((4, 4, 4), 0.5)
    assert align(flat, np.zeros((4, 4, 4), bool), 0) == (0, 0, 0)
    # One voxel wide between two that are alike: one step to either side, the smaller one first.
    probs = np.zeros((1, 1, 5))
    probs[0, 0, [1, 3]] = 0.9
    reference = np.zeros((1, 1, 5), bool)
    reference[0, 0, 2] = True
    assert align(probs, reference, (0, 0, 1)) == (0, 0, -1)


def test_probabilities_of_0_and_1_are_finite():
    assert align(np.ones((3, 3, 3)), np.zeros((3, 3, 3), bool), 1) == scan(
        np.ones((3, 3, 3)), np.zeros((3, 3, 3), bool), 1
    )


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="one shape"):
        align(np.zeros((2, 2, 2)), np.zeros((2, 2, 3), bool), 1)


def test_what_is_not_seen_counts_for_nothing():
    """A scan that ends in the middle of an organ: what lies beyond is no evidence against it."""
    organ = np.zeros((16, 16, 16), bool)
    organ[4:12, 4:12, 4:12] = True
    probs = np.clip(organ.astype(np.float64), 0.05, 0.95)
    seen = np.ones_like(organ)
    seen[:8] = False
    reference = np.where(seen, organ, False)
    assert align(probs, reference, 4, seen=seen) == (0, 0, 0)
    assert align(probs, reference, 4)[0] > 0


def test_a_reference_of_probabilities():
    rng = np.random.default_rng(3)
    shape, most = (5, 6, 4), 2
    probs, soft = rng.random(shape), rng.random(shape)
    scores = {}
    padded = np.clip(np.pad(probs, most), 1e-3, 1 - 1e-3)
    for shift in product(range(-most, most + 1), repeat=3):
        moved = padded[tuple(slice(most - t, most - t + n) for t, n in zip(shift, shape, strict=True))]
        scores[shift] = (soft * np.log(moved) + (1 - soft) * np.log1p(-moved)).sum()
    assert align(probs, soft, most, eps=1e-3) == max(scores, key=scores.get)
