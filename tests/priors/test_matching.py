"""Masks moved onto one another: the prior that they make (ours; METHOD.md 2.1)."""

import numpy as np
import pytest

from organseg.priors import matched_centre, matched_prior
from organseg.priors.build import bounding_box

SHIFT = (3, 3, 3)


def blob(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """A random mask that reaches all borders of its array."""
    mask = np.random.default_rng(seed).random(shape) < 0.6
    mask[0, 0, 0] = mask[-1, -1, -1] = True
    return mask


def test_the_room_around_a_mask_does_not_matter():
    masks = [blob(seed, (7 + seed, 9, 8 - seed)) for seed in range(3)]
    roomy = [np.pad(mask, 20) for mask in masks]
    assert np.array_equal(matched_prior(masks, SHIFT), matched_prior(roomy, SHIFT))


def test_equal_masks_lie_on_each_other():
    mask = blob(0, (7, 9, 8))
    tailed = np.pad(mask, ((0, 4), (0, 0), (0, 0)))
    tailed[-4:, 4, 4] = True
    prior = matched_prior([mask, tailed, mask], SHIFT)
    assert sorted(np.unique(prior.round(3))) == [0, np.float32(0.333), 1]
    assert (prior == 1).sum() == mask.sum()


@pytest.mark.parametrize("shown", [slice(0, 21), slice(21, 60)])
def test_a_scan_that_ends_in_the_organ_does_not_move_it(shown: slice):
    z, y, x = np.ogrid[:60, :50, :50]
    organ = (((z - 22) / 12) ** 2 + ((y - 24) / 8) ** 2 + ((x - 26) / 6) ** 2) <= 1
    prior, probs = matched_prior([organ], SHIFT), 0.95 * organ[shown]
    box = bounding_box(probs > 0.5)
    found = matched_centre(probs, box, prior, (15, 10, 10))
    np.testing.assert_allclose(found, (22 - shown.start, 24, 26), atol=1.0)
    assert abs((box[0] + box[1] - 1)[0] / 2 + shown.start - 22) > 4, "the middle of what is seen"


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("side", [0, 1])
def test_a_prior_does_not_flee_from_a_scan_that_shows_the_whole_organ(axis: int, side: int):
    # A mean of two shapes, one large: that the smaller shape lacks, the prior could put where nobody looks.
    small, large = np.zeros((30, 30, 30), dtype=bool), np.zeros((30, 30, 30), dtype=bool)
    small[12:17, 12:17, 12:17] = True
    large[8:21, 8:21, 8:21] = True
    prior = matched_prior([small, large, large], SHIFT)
    shown = [slice(None)] * 3
    shown[axis] = slice(11, None) if side == 0 else slice(None, 18)  # one voxel beyond the organ
    probs = small[tuple(shown)]
    found = matched_centre(probs, bounding_box(probs), prior, (6, 6, 6))
    middle = np.full(3, 14)
    middle[axis] -= shown[axis].start or 0
    np.testing.assert_allclose(found, middle, atol=4.0)
    assert matched_centre(np.pad(probs, 20), bounding_box(np.pad(probs, 20)), prior, (6, 6, 6)) == pytest.approx(
        found + 20
    )
