"""Which of a case's candidates are believed: the share of METHOD.md 1.5, and what three dimensions say of it.

The networks see single slices; an organ is one body. So candidates may be ranked by the mean of their score around
them, be limited to the largest connected piece, and to the volume that the organ has where it is annotated. All of it
works on one organ of one case at a time, inside the box of its candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from organseg.errors import UsageError

TOUCHING = np.ones((3, 3, 3), dtype=bool)
"""Voxels that share a corner belong to one piece."""


@dataclass(frozen=True)
class Selection:
    """What may become a pseudo-label; the default is the thesis's.

    Attributes:
        threshold: A candidate's probability is at least this. With few labels a network is rarely as sure as 0.5 of
            organs that it does find.
        smooth_mm: Rank by the score averaged around the voxel (Gaussian of this standard deviation; what is no
            candidate counts as 0, so that borders come last); 0 ranks by the voxel's own.
        largest_piece: Believe only the connected piece of an organ with the largest sum of probabilities.
        max_volume: Add no more of an organ than this multiple of its mean volume in the cases that annotate it, times
            the round's share; null sets no limit.
    """

    threshold: float = 0.5
    smooth_mm: float = 0.0
    largest_piece: bool = False
    max_volume: float | None = None

    def __post_init__(self) -> None:
        limit = self.max_volume if self.max_volume is not None else 1.0
        if not 0 < self.threshold < 1 or not 0 <= self.smooth_mm < np.inf or not 0 < limit < np.inf:
            raise UsageError(
                f"curriculum.selection: threshold {self.threshold} must be between 0 and 1, smooth_mm "
                f"{self.smooth_mm} at least 0 and max_volume {self.max_volume} above 0"
            )


def select_confident(score: NDArray[Any], candidates: NDArray[np.bool_], gamma: float) -> NDArray[np.bool_]:
    """The share of the candidates with the highest scores (METHOD.md 1.5).

    Args:
        score: Any shape.
        candidates: The same shape.
        gamma: Share to keep, 0..1.

    Returns:
        bool of that shape: exactly ceil(gamma n - 1e-9) of the n candidates, ties by lower index.

    Raises:
        ValueError: If gamma is not in 0..1, the shapes differ, or a candidate's score is NaN.
    """
    if not 0 <= gamma <= 1 or score.shape != candidates.shape:
        msg = f"gamma must be in 0..1 and shapes equal, got {gamma}, {score.shape} and {candidates.shape}"
        raise ValueError(msg)
    places = np.flatnonzero(candidates)
    ranked = score.ravel()[places]
    if np.isnan(ranked).any():
        msg = "a candidate's score is NaN"
        raise ValueError(msg)
    count = max(0, ceil(gamma * len(places) - 1e-9))
    chosen = np.zeros(score.size, dtype=bool)
    chosen[places[np.argsort(-ranked, kind="stable")[:count]]] = True
    return chosen.reshape(score.shape)


def choose(
    index: NDArray[np.int64],
    score: NDArray[np.float32],
    probability: NDArray[np.float32],
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    gamma: float,
    selection: Selection,
    mean_ml: float = np.nan,
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Choose among the candidates of one organ in one case.

    Args:
        index: [n] flat places, rising.
        score: [n].
        probability: [n] of the organ.
        shape: [Z, Y, X] that `index` counts in.
        spacing: mm (z, y, x).
        gamma: Share to keep, 0..1.
        selection: What else is asked of them.
        mean_ml: Mean volume of the organ where it is annotated; NaN sets no limit.

    Returns:
        [n] bool, chosen; [n] the scores that ranked them; and [n] the probabilities, averaged like the scores, so that
        the two can be compared as rankings.
    """
    if not len(index):
        return np.zeros(0, dtype=bool), score, probability
    places = np.unravel_index(index, shape)
    low = [int(axis.min()) for axis in places]
    places = tuple(axis - start for axis, start in zip(places, low, strict=True))
    box = tuple(int(axis.max()) + 1 for axis in places)
    eligible = np.ones(len(index), dtype=bool)
    if selection.largest_piece:
        inside = np.zeros(box, dtype=bool)
        inside[places] = True
        piece = ndimage.label(inside, TOUCHING)[0][places]
        eligible = piece == np.bincount(piece, weights=probability).argmax()
    if selection.smooth_mm:
        sigma = [selection.smooth_mm / mm for mm in spacing]
        score, probability = (_averaged(values, places, box, sigma) for values in (score, probability))
    if selection.max_volume is not None and np.isfinite(mean_ml):
        most = selection.max_volume * mean_ml / (float(np.prod(spacing)) / 1000)
        gamma *= min(1.0, most / int(eligible.sum()))
    return select_confident(score, eligible, gamma), score, probability


def _averaged(
    values: NDArray[np.float32], places: tuple[NDArray[np.int64], ...], box: tuple[int, ...], sigma: Sequence[float]
) -> NDArray[np.float32]:
    field = np.zeros(box, dtype=np.float32)
    field[places] = values
    found: NDArray[np.float32] = ndimage.gaussian_filter(field, sigma, mode="constant", truncate=2.0)[places]
    return found
