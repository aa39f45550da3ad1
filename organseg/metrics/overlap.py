"""Voxel counts of all organs in one pass over two label maps, and the Dice score from them (METHOD.md 4, equation 2.8).

Counts add up: those of a case are the sums over its slabs or slices, so a case never has to be in memory whole.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from organseg.batch import IGNORE

_CHUNK = 1 << 20
"""Voxels counted at a time: the temporaries stay in a core's cache, and below 10 MB whatever the case's size."""


@dataclass(frozen=True, eq=False)
class OverlapCounts:
    """Voxel counts per organ, ignore voxels left out.

    Attributes:
        intersection: int64 [K], voxels that both maps give to the organ.
        preds: int64 [K], voxels predicted.
        label: int64 [K], voxels of the truth.
    """

    intersection: NDArray[np.int64]
    preds: NDArray[np.int64]
    label: NDArray[np.int64]

    def __add__(self, other: "OverlapCounts") -> "OverlapCounts":
        """Counts of two disjoint parts of a case together."""
        return OverlapCounts(self.intersection + other.intersection, self.preds + other.preds, self.label + other.label)


def overlap_counts(preds: NDArray[np.uint8], label: NDArray[np.uint8], organs: int) -> OverlapCounts:
    """Count each organ's voxels in both maps and in their intersection.

    Args:
        preds: uint8 [*S], values 0..K.
        label: uint8 [*S], values 0..K, or 255 where the truth is unknown for all: these voxels count in neither map.
        organs: K.

    Returns:
        Counts int64 [K].

    Raises:
        ValueError: If dtypes or shapes do not fit, or a map holds another value.
    """
    check_label_maps(preds, label)
    flat_preds, flat_label = preds.reshape(-1), label.reshape(-1)
    joint = np.zeros(1 << 16, np.int64)
    for start in range(0, flat_preds.size, _CHUNK):
        ours, theirs = flat_preds[start : start + _CHUNK], flat_label[start : start + _CHUNK]
        # Most of a scan is background in both maps, which nobody asks about: dropping it first saves most of the time.
        relevant = (ours | theirs) != 0
        code = ours[relevant].astype(np.uint16) << 8 | theirs[relevant]
        joint += np.bincount(code, minlength=1 << 16)
    table = joint.reshape(256, 256)
    _check_values("preds", table.sum(1), organs, ())
    _check_values("label", table.sum(0), organs, (IGNORE,))
    known = table[: organs + 1, : organs + 1]
    return OverlapCounts(np.diagonal(known)[1:].copy(), known.sum(1)[1:], known.sum(0)[1:])


def dsc(counts: OverlapCounts) -> NDArray[np.float64]:
    """Dice score (equation 2.8), 2 |M and G| / (|M| + |G|): 1 where both are empty, 0 where one is.

    Args:
        counts: Counts of one case.

    Returns:
        float64 [K], in [0, 1].
    """
    total = counts.preds + counts.label
    scores: NDArray[np.float64] = np.ones(total.shape)
    np.divide(2 * counts.intersection, total, out=scores, where=total > 0)
    return scores


def check_label_maps(preds: NDArray[np.uint8], label: NDArray[np.uint8]) -> None:
    """Refuse a pair of maps that cannot be compared voxel by voxel.

    Raises:
        ValueError: If they are not uint8 and of one shape.
    """
    if preds.dtype != np.uint8 or label.dtype != np.uint8:
        msg = f"`preds` and `label` must be uint8 label maps, got {preds.dtype} and {label.dtype}"
        raise ValueError(msg)
    if preds.shape != label.shape:
        msg = f"`preds` and `label` must have one shape, got {preds.shape} and {label.shape}"
        raise ValueError(msg)


def _check_values(name: str, histogram: NDArray[np.int64], organs: int, also: tuple[int, ...]) -> None:
    """Raise ValueError if a map holds a value that is neither 0..K nor in `also`."""
    found = set(np.flatnonzero(histogram).tolist()).difference(range(organs + 1), also)
    if found:
        allowed = f"0..{organs}" + "".join(f" or {value}" for value in also)
        msg = f"`{name}` must hold {allowed}, found {sorted(found)}"
        raise ValueError(msg)
