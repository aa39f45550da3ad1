"""A whole case through a 2D network, slab by slab (METHOD.md 4).

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

Slab = tuple[int, Tensor]
"""First slice on the wanted grid, and probabilities [b, C, Y, X] of b slices."""


def segment_slices(
    case: WholeCase,
    probabilities: Callable[[Tensor], Tensor],
    decide: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    batch_size: int = 16,
    keep: Callable[[int, Tensor], None] | None = None,
) -> NDArray[np.uint8]:
    """Segment a case.

    Args:
        case: The case; `case.shape` is the wanted grid.
        probabilities: Normalised slices [b, 1, H, W] -> probabilities [b, C, H, W].
        decide: Probabilities [b, C, Y, X] -> labels [b, Y, X].
        device: Where the network is.
        batch_size: Slices that the network sees at a time.
        keep: Is given (first slice, probabilities) of each slab as it completes.

    Returns:
        Labels uint8 [Z, Y, X] on the wanted grid.
    """
    preds = np.empty(case.shape, dtype=np.uint8)
    with torch.inference_mode():
        for start, probs in _slabs(case, probabilities, device, batch_size):
            preds[start : start + len(probs)] = decide(probs).to(torch.uint8).cpu().numpy()
            if keep:
                keep(start, probs)
    return preds


def _slabs(
    case: WholeCase, probabilities: Callable[[Tensor], Tensor], device: torch.device, batch_size: int
) -> Iterator[Slab]:
    """Probabilities of the wanted slices, in order."""
    lower, upper, weight = _neighbours(len(case.image), case.shape[0])
    planes: dict[int, Tensor] = {}
    done = 0
    for start in range(0, case.shape[0], SLAB):
        wanted = slice(start, min(start + SLAB, case.shape[0]))
        first, last = int(lower[wanted][0]), int(upper[wanted][-1])
        planes = {z: plane for z, plane in planes.items() if z >= first}
        while done <= last:
            images = torch.from_numpy(case.normalise(case.image[done : done + batch_size])).unsqueeze(1)
            for plane in probabilities(images.to(device)).float():
                planes[done] = plane
                done += 1
        below = torch.stack([planes[int(z)] for z in lower[wanted]])
        if weight[wanted].any():
            above = torch.stack([planes[int(z)] for z in upper[wanted]])
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
