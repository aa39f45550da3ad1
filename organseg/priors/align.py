"""Where a coarse segmentation lies, against a reference of the same organ (METHOD.md 2.3; thesis, 4.2.3).

A bounding box follows every stray voxel and every missing piece. The translation that makes the probabilities most like
a whole organ's mask, in Kullback-Leibler divergence, does not.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import fft

EPS = 1e-6
_NEAR = 1e-9


def align(
    probs: NDArray[np.floating],
    reference: NDArray[np.floating] | NDArray[np.bool_],
    max_shift: int | Sequence[int],
    *,
    seen: NDArray[np.bool_] | None = None,
    eps: float = EPS,
) -> tuple[int, int, int]:
    """The translation t of `probs` that minimises KL(reference || probs shifted by t).

    With a Bernoulli distribution a voxel this is where the sum over x of r(x) ln p(x - t) + (1 - r(x)) ln(1 - p(x - t))
    is greatest. Both terms are correlations, so that all translations are evaluated at once by FFT; what rounding
    cannot tell apart is summed up again.

    Args:
        probs: [Z, Y, X] in 0..1; clamped to [eps, 1 - eps], and eps beyond the array.
        reference: [Z, Y, X], of the same shape: a mask, or probabilities.
        max_shift: Largest translation of each axis, to either side, in voxels.
        seen: [Z, Y, X] where the reference is known; default: everywhere.
        eps: See `probs`.

    Returns:
        (dz, dy, dx): `probs` moved by it lies on `reference`; of equal ones the shortest, then the first in order.

    Raises:
        ValueError: If the shapes differ.
    """
    if probs.shape != reference.shape:
        msg = f"`probs` and `reference` must have one shape, got {probs.shape} and {reference.shape}"
        raise ValueError(msg)
    most = np.broadcast_to(np.asarray(max_shift), 3)
    inside, outside = _gains(probs, eps)
    weight = np.ones(reference.shape) if seen is None else seen.astype(np.float64)
    weighted = weight * reference
    scores = _correlations(weighted, weight, inside, outside, most)
    best = scores.max()
    scale = np.abs(inside).sum() + np.abs(outside).sum() + 1
    near = np.argwhere(scores >= best - _NEAR * scale) - most
    if len(near) > 1:
        exact = np.array([_score(weighted, weight, inside, outside, shift) for shift in near])
        near = near[exact >= exact.max() - 1e-12 * scale]
    order = np.lexsort((*near.T[::-1], (near**2).sum(axis=1)))
    dz, dy, dx = (int(step) for step in near[order[0]])
    return (dz, dy, dx)


def _gains(probs: NDArray[np.floating], eps: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a voxel of `probs` adds where the reference is, and where it is not, beside what lies beyond the array."""
    clamped = np.clip(probs.astype(np.float64), eps, 1 - eps)
    return np.log(clamped) - np.log(eps), np.log1p(-clamped) - np.log1p(-eps)


def _correlations(
    reference: NDArray[np.float64],
    weight: NDArray[np.float64],
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    most: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Scores of all translations, [2 m + 1 for each axis]; `reference` is weighted."""
    # sum_x w(x) (r(x) a(x - t) + (1 - r(x)) b(x - t)): correlations of w r with a - b and of w with b.
    sizes = [fft.next_fast_len(int(n + m), real=True) for n, m in zip(reference.shape, most, strict=True)]
    mask = fft.rfftn(reference, sizes)
    whole = fft.rfftn(weight, sizes)
    product = mask * fft.rfftn(inside - outside, sizes).conj() + whole * fft.rfftn(outside, sizes).conj()
    scores = fft.irfftn(product, sizes)
    return np.asarray(scores[np.ix_(*(np.arange(-m, m + 1) % n for m, n in zip(most, sizes, strict=True)))])


def _score(
    reference: NDArray[np.float64],
    weight: NDArray[np.float64],
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    shift: NDArray[np.int64],
) -> float:
    """Score of one translation, term by term; `reference` is weighted."""
    to, of = [], []
    for step, n in zip(shift, reference.shape, strict=True):
        to.append(slice(max(0, int(step)), max(0, min(n, n + int(step)))))
        of.append(slice(max(0, -int(step)), max(0, min(n, n - int(step)))))
    there, rest = reference[tuple(to)], (weight - reference)[tuple(to)]
    return float((there * inside[tuple(of)] + rest * outside[tuple(of)]).sum())
