"""Organs centred where their prior fits best, instead of in the middle of their bounding boxes (ours).

The middle of a bounding box depends on two voxels an axis: a thin tip of the liver moves it by centimetres, and two
pancreases that lie on each other have different ones. A prior of organs that are moved onto one another is sharper, and
one that is placed where it explains a segmentation best, whoever made that, lies nearer to the organ.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from organseg.priors.align import align
from organseg.priors.build import Box, Prior, bin_of, bounding_box, box_start, cropped

FLOOR = 1e-3
ROUNDS = 3


def matched_prior(masks: Sequence[NDArray[np.bool_]], max_shift: Sequence[int]) -> NDArray[np.float32]:
    """The mean of masks that are moved onto it, three times.

    Args:
        masks: bool [Z, Y, X], as for `build_prior`.
        max_shift: Largest move of each round, along each axis, in voxels.

    Returns:
        float32 [dz, Hp, Wp], slice by slice; the box covers all masks.
    """
    boxes = [bounding_box(mask) for mask in masks]
    centres = [(low + high - 1) / 2 for low, high in boxes]
    mean = _mean(masks, boxes, centres)
    for _ in range(ROUNDS):
        moved = [matched_centre(mask, box, mean, max_shift, whole=True) for mask, box in zip(masks, boxes, strict=True)]
        drift = np.mean([new - old for new, old in zip(moved, centres, strict=True)], axis=0)
        centres = [new - drift for new in moved]
        mean = _mean(masks, boxes, centres)
    return mean


def _mean(
    masks: Sequence[NDArray[np.bool_]], boxes: Sequence[Box], centres: Sequence[NDArray[np.float64]]
) -> NDArray[np.float32]:
    """Share of the masks at each voxel of the smallest box around the common centre that covers them."""
    reach = [np.maximum(centre - low, high - 1 - centre) for (low, high), centre in zip(boxes, centres, strict=True)]
    half = np.ceil(np.max(reach, axis=0)).astype(np.int64)
    size = 2 * half + 1
    total = np.zeros(size, dtype=np.float32)
    for mask, centre in zip(masks, centres, strict=True):
        middle = np.round(centre).astype(np.int64)
        total += cropped(mask, size, (middle, middle + 1))
    total /= len(masks)
    return total


def matched_centre(
    probs: NDArray[np.floating] | NDArray[np.bool_],
    around: Box,
    mean: NDArray[np.float32],
    max_shift: Sequence[int],
    *,
    whole: bool = False,
) -> NDArray[np.float64]:
    """Where a prior explains a segmentation best: the centre (z, y, x) in voxels.

    Args:
        probs: [Z, Y, X] of one organ, or its mask.
        around: Bounding box of the organ, from whose middle the prior is moved.
        mean: [Z', Y', X'] the prior's box, slice by slice.
        max_shift: Largest move along each axis, in voxels.
        whole: Beyond `probs` nothing is of the organ; else nobody knows beyond the borders that `around` reaches, where
            a scan cuts the organ.
    """
    most = np.asarray(max_shift)
    size = np.array(mean.shape) + 2 * most
    moved = cropped(mean, size, (np.zeros(3, dtype=np.int64), np.array(mean.shape)))
    shown = cropped(probs, size, around)
    start = box_start(*around, size)
    seen = None if whole else _seen(start, size, around, probs.shape)
    step = np.array(align(moved, shown, max_shift, seen=seen, eps=FLOOR))
    centre: NDArray[np.float64] = start + (size - 1) / 2 + step
    return centre


def _seen(start: NDArray[np.int64], size: NDArray[np.int64], around: Box, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Where in a box it is known whether the organ is there: not beyond borders that the organ reaches."""
    cut, ends = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for axis, (first, n, low, high, end) in enumerate(zip(start, size, *around, shape, strict=True)):
        place = first + np.arange(n)
        line = [1, 1, 1]
        line[axis] = n
        below, above = place < 0, place >= end
        cut |= (below & (low <= 0) | above & (high >= end)).reshape(line)
        ends |= (below & (low > 0) | above & (high < end)).reshape(line)
    seen: NDArray[np.bool_] = ends | ~cut
    return seen


def continued(box: Box, shape: Sequence[int], mean: NDArray[np.float32]) -> Box:
    """The bounding box of an organ that reaches a border of the scan, as if it went on there.

    Args:
        box: Of what is seen of the organ.
        shape: Of the scan.
        mean: [Z', Y', X'] the prior's box, slice by slice; what it has half of its greatest value in is the extent of
            an organ.

    Returns:
        The box, longer by what is missing of that extent, where it touches a border at one end of an axis alone.
    """
    usual = bounding_box(mean >= mean.max() / 2)
    missing = np.maximum(usual[1] - usual[0] - (box[1] - box[0]), 0)
    below, above = box[0] == 0, box[1] == np.array(shape)
    return box[0] - missing * (below & ~above), box[1] + missing * (above & ~below)


def slices_of(prior: Prior) -> NDArray[np.float32]:
    """A prior's box slice by slice, float32 [dz, Hp, Wp]."""
    depth = prior.size[0]
    each: NDArray[np.float32] = prior.probs[bin_of(np.arange(depth), len(prior.probs), depth)]
    return each
