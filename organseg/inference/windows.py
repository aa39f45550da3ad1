"""A whole case through a 3D network: overlapping windows, weighted towards their middles (Isensee et al., 2021).

Windows go through the case from below. What is held is one window's depth of summed probabilities; the slices below
the next windows are complete and leave at once, so that memory does not grow with the length of the scan.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from organseg.batch import View, WholeCase
from organseg.inference.slabs import Keep, decided
from organseg.inference.view import view_of


def segment_windows(
    case: WholeCase,
    probabilities: Callable[[View], Tensor],
    decide: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    overlap: float = 0.5,
    keep: Keep | None = None,
) -> NDArray[np.uint8]:
    """Segment a case.

    Args:
        case: The case, with its `window`; where it is shorter, it lies in the window's middle as in training.
        probabilities: Patches [1, 1, D, H, W] -> probabilities [1, C, D, H, W].
        decide: Probabilities [b, C, Y, X] -> labels [b, Y, X].
        device: Where the network is.
        overlap: Least share of a window that the next one along an axis sees again.
        keep: Is given (first slice, probabilities) of each slab as it completes.

    Returns:
        Labels uint8 [Z, Y, X] on the wanted grid.
    """
    assert case.window is not None
    with torch.inference_mode():
        return decided(case, _planes(case, case.window, probabilities, device, overlap), decide, keep)


def _planes(
    case: WholeCase,
    window: Sequence[int],
    probabilities: Callable[[View], Tensor],
    device: torch.device,
    overlap: float,
) -> Iterator[Tensor]:
    """Probabilities [C, H, W] of each slice, in order."""
    # A case shorter than the window is seen as in training: in its middle, with air around. What the network says of
    # the air is dropped; the numbers below are those of the case.
    before = [max(0, size - n) // 2 for n, size in zip(case.image.shape, window, strict=True)]
    around = [(low, max(0, size - n) - low) for low, n, size in zip(before, case.image.shape, window, strict=True)]
    shape = case.image.shape
    depth, height, width = sizes = [min(n, size) for n, size in zip(shape, window, strict=True)]
    starts = [window_starts(n, size, overlap) for n, size in zip(shape, sizes, strict=True)]
    inner = tuple(slice(low, low + n) for low, n in zip(before, sizes, strict=True))
    bells = [bell(size).to(device) for size in sizes]
    weight = bells[0].view(-1, 1, 1) * bells[1].view(-1, 1) * bells[2]
    # Windows stand on a grid, so that the sum of all weights at a voxel is a product over the axes.
    z_sum, y_sum, x_sum = (_total(n, starting, along) for n, starting, along in zip(shape, starts, bells, strict=True))
    plane_sum = y_sum.view(-1, 1) * x_sum
    held: Tensor | None = None
    for z, following in zip(starts[0], [*starts[0][1:], shape[0]], strict=True):
        for y, x in product(*starts[1:]):
            patch = case.normalise(case.image[z : z + depth, y : y + height, x : x + width])
            patch = np.pad(patch, around, constant_values=case.floor)
            corner = [low - more for low, more in zip((z, y, x), before, strict=True)]
            view = view_of(case, torch.from_numpy(patch)[None, None], [corner], device)
            probs = probabilities(view)[0].float()[:, *inner]
            if held is None:
                held = torch.zeros(depth, len(probs), *shape[1:], device=device)
            held[:, :, y : y + height, x : x + width] += (probs * weight).transpose(0, 1)
        assert held is not None
        for offset in range(following - z):
            yield held[offset] / (plane_sum * z_sum[z + offset])
        for offset in range(following - z, depth):  # slice by slice: a copy of all would double what is held
            held[offset - (following - z)] = held[offset]
        held[depth - (following - z) :] = 0


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First indices of the fewest windows that cover an axis with this overlap or a voxel less; evenly spread."""
    step = max(1.0, window * (1 - overlap))
    count = int(np.ceil((length - window) / step)) + 1
    return [round(start) for start in np.linspace(0, length - window, count)]


def bell(window: int) -> Tensor:
    """[window] Gaussian weights, 1 in the middle, with a standard deviation of an eighth of the window."""
    place = torch.arange(window) - (window - 1) / 2
    return torch.exp(-0.5 * (place / (window / 8)) ** 2)


def _total(length: int, starts: Sequence[int], along: Tensor) -> Tensor:
    """[length] sum of the weights of all windows along one axis."""
    total = torch.zeros(length, device=along.device)
    for start in starts:
        total[start : start + len(along)] += along
    return total
