"""The prior of an organ (METHOD.md 2.1; thesis, Algorithm 3 and Figure 4.2).

Around its centre, how often a voxel belongs to the organ: masks are cropped to one box that covers the largest of each
extent, and slices are summed up in a few bins from the lowest to the highest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Box = tuple[NDArray[np.int64], NDArray[np.int64]]
"""First index and end (z, y, x)."""


@dataclass(frozen=True, eq=False)
class Prior:
    """What a run knows of where an organ is.

    Attributes:
        organ: Canonical name.
        probs: float32 [bins, Hp, Wp] in 0..1, bin 0 the lowest.
        box_mm: Extent (z, y, x) of the box that the bins divide along z.
        spacing: mm (z, y, x) of the working grid that it was built on.
        bins: Asked for; `probs` has fewer where the box has fewer slices.
        cases: It was built of.
    """

    organ: str
    probs: NDArray[np.float32]
    box_mm: tuple[float, float, float]
    spacing: tuple[float, float, float]
    bins: int
    cases: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels (z, y, x) of the box."""
        z, y, x = (round(mm / step) for mm, step in zip(self.box_mm, self.spacing, strict=True))
        return (z, y, x)


def build_prior(masks: Sequence[NDArray[np.bool_]], bins: int = 5) -> NDArray[np.float32]:
    """Algorithm 3.

    Args:
        masks: bool [Z, Y, X] of the annotated cases, each with at least one voxel, on one working grid.
        bins: Slices of the box are shared among so many; more than the box has slices means one bin a slice.

    Returns:
        float32 [bins, Hp, Wp]: share of the masks' voxels at each place of the box, bin 0 the lowest slices.

    Raises:
        ValueError: If there is no mask, one is empty, or `bins` is not positive.
    """
    if bins < 1 or not masks:
        msg = f"`bins` must be at least 1 and `masks` not empty, got {bins} and {len(masks)} masks"
        raise ValueError(msg)
    boxes = [bounding_box(mask) for mask in masks]
    size = np.max([high - low for low, high in boxes], axis=0)
    bins = min(bins, int(size[0]))
    sums = np.zeros((bins, *size[1:]), dtype=np.float64)
    place = bin_of(np.arange(size[0]), bins, int(size[0]))
    for mask, box in zip(masks, boxes, strict=True):
        np.add.at(sums, place, cropped(mask, size, box))
    slices = np.bincount(place, minlength=bins) * len(masks)
    return (sums / slices[:, None, None]).astype(np.float32)


def smoothed(slices: NDArray[np.float32], sigma: Sequence[float]) -> NDArray[np.float32]:
    """A prior of few cases, blurred: what they have not shown is not impossible (ours).

    Args:
        slices: [dz, Hp, Wp], before it is divided into bins.
        sigma: Standard deviation of the blur along each axis, in voxels (z, y, x). The box grows by two of them in the
            plane, but not along z: its lowest and highest bin would be of less organ.

    Returns:
        float32 [dz, Hp', Wp'].
    """
    more = [0, *(int(np.ceil(2 * length)) for length in sigma[1:])]
    padded = np.pad(slices, [(n, n) for n in more])
    modes: list[Literal["constant", "nearest"]] = ["nearest", "constant", "constant"]
    blurred: NDArray[np.float32] = ndimage.gaussian_filter(padded, sigma, mode=modes)
    return blurred


def binned(slices: NDArray[np.floating], bins: int) -> NDArray[np.float32]:
    """Means of the slices of each bin: [dz, Hp, Wp] -> float32 [bins, Hp, Wp], or [dz, ...] where that is less."""
    depth = len(slices)
    place = bin_of(np.arange(depth), min(bins, depth), depth)
    sums = np.zeros((place[-1] + 1, *slices.shape[1:]))
    np.add.at(sums, place, slices)
    return (sums / np.bincount(place)[:, None, None]).astype(np.float32)


def bounding_box(mask: NDArray[np.bool_]) -> Box:
    """First index and end (z, y, x) of the smallest box with all voxels of a mask.

    Raises:
        ValueError: If the mask has none.
    """
    low, high = [], []
    for axis in range(mask.ndim):
        found = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not len(found):
            msg = "a mask has no voxel"
            raise ValueError(msg)
        low.append(found[0])
        high.append(found[-1] + 1)
    return np.array(low), np.array(high)


def box_start(low: NDArray[np.int64], high: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where a box of this size begins that has the middle of [low, high); half a voxel goes down."""
    start: NDArray[np.int64] = (low + high - size) // 2
    return start


def cropped(array: NDArray[Any], size: NDArray[np.int64], around: Box) -> NDArray[Any]:
    """A box of this size around the middle of another one; 0 where it leaves the array."""
    start = box_start(*around, size)
    result = np.zeros(size, dtype=array.dtype)
    low, high = np.clip(start, 0, array.shape), np.clip(start + size, 0, array.shape)
    if (low < high).all():
        there = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        result[there] = array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return result


def bin_of(index: NDArray[np.int64], bins: int, depth: int) -> NDArray[np.int64]:
    """floor(B i / dz): the bin of a box's slice."""
    place: NDArray[np.int64] = index * bins // depth
    return place
