"""From planes of probabilities on the working grid to labels on the wanted grid, slab by slab (METHOD.md 4).

Probabilities exist for a few slices at a time: they are resampled linearly to the wanted grid, decided at once and
dropped, so that memory does not grow with the number of organs times the volume.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from organseg.batch import WholeCase

SLAB = 4
"""Slices of the wanted grid whose probabilities exist at a time: a network's batch can be larger on its own grid."""

Keep = Callable[[int, Tensor], None]
"""Is given the first slice and the probabilities [b, C, Y, X] of each slab as it completes."""


def decided(
    case: WholeCase, planes: Iterator[Tensor], decide: Callable[[Tensor], Tensor], keep: Keep | None
) -> NDArray[np.uint8]:
    """Labels of a case.

    Args:
        case: The case; `case.shape` is the wanted grid.
        planes: Probabilities [C, H, W] of each slice of the working grid, in order.
        decide: Probabilities [b, C, Y, X] -> labels [b, Y, X].
        keep: Sees each slab.

    Returns:
        uint8 [Z, Y, X] on the wanted grid.
    """
    preds = np.empty(case.shape, dtype=np.uint8)
    for start, probs in _slabs(case, planes):
        preds[start : start + len(probs)] = decide(probs).to(torch.uint8).cpu().numpy()
        if keep:
            keep(start, probs)
    return preds


def _slabs(case: WholeCase, planes: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """First slice and probabilities [b, C, Y, X] on the wanted grid, in order."""
    lower, upper, weight = _neighbours(len(case.image), case.shape[0])
    held: dict[int, Tensor] = {}
    done = 0
    for start in range(0, case.shape[0], SLAB):
        wanted = slice(start, min(start + SLAB, case.shape[0]))
        first, last = int(lower[wanted][0]), int(upper[wanted][-1])
        held = {z: plane for z, plane in held.items() if z >= first}
        while done <= last:
            held[done] = next(planes)
            done += 1
        below = torch.stack([held[int(z)] for z in lower[wanted]])
        if weight[wanted].any():
            above = torch.stack([held[int(z)] for z in upper[wanted]])
            share = torch.from_numpy(weight[wanted]).to(below).view(-1, 1, 1, 1)
            below = below.lerp(above, share)
        if below.shape[2:] != case.shape[1:]:
            below = F.interpolate(below, case.shape[1:], mode="bilinear", align_corners=False)
        yield start, below


def _neighbours(have: int, want: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Of each wanted slice: the slices below and above it, and the share of the upper one (borders on borders)."""
    position = np.clip((np.arange(want) + 0.5) * have / want - 0.5, 0, have - 1)
    lower = np.floor(position).astype(np.int64)
    return lower, np.minimum(lower + 1, have - 1), (position - lower).astype(np.float32)
