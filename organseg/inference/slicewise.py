"""A whole case through a 2D network, a few slices at a time."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from organseg.batch import View, WholeCase
from organseg.inference.slabs import Keep, decided
from organseg.inference.view import view_of


def segment_slices(
    case: WholeCase,
    probabilities: Callable[[View], Tensor],
    decide: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    batch_size: int = 16,
    keep: Keep | None = None,
) -> NDArray[np.uint8]:
    """Segment a case.

    Args:
        case: The case; `case.shape` is the wanted grid.
        probabilities: Slices [b, 1, H, W] -> probabilities [b, C, H, W].
        decide: Probabilities [b, C, Y, X] -> labels [b, Y, X].
        device: Where the network is.
        batch_size: Slices that the network sees at a time; fewer where the device has no memory for them.
        keep: Is given (first slice, probabilities) of each slab as it completes.

    Returns:
        Labels uint8 [Z, Y, X] on the wanted grid.
    """

    def planes() -> Iterator[Tensor]:
        start, size = 0, batch_size
        while start < len(case.image):
            images = torch.from_numpy(case.normalise(case.image[start : start + size])).unsqueeze(1)
            corners = [(start + z, 0, 0) for z in range(len(images))]
            try:
                found = probabilities(view_of(case, images, corners, device)).float()
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                continue
            yield from found
            start += len(images)

    with torch.inference_mode():
        return decided(case, planes(), decide, keep)
