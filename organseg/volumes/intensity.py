"""From HU to what a network sees (METHOD.md 0): clip to a window, subtract the mean, divide by the standard deviation.

The statistics are those of the fold's training cases, and travel with the checkpoint: prediction needs nothing else. MR
has no absolute scale, so each MR case is normalised by its own statistics.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Normalisation:
    """Clip to `window` (HU for CT), then (value - mean) / std."""

    window: tuple[float, float]
    mean: float
    std: float

    def __call__(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Any shape and type -> float32, normalised."""
        clipped: NDArray[np.float32] = np.clip(image, *self.window).astype(np.float32)
        clipped -= np.float32(self.mean)
        clipped *= np.float32(1 / self.std)
        return clipped

    @property
    def floor(self) -> float:
        """What air becomes: the lowest normalised value."""
        return (self.window[0] - self.mean) / self.std


def fit_normalisation(images: Iterable[NDArray[Any]], window: tuple[float, float]) -> Normalisation:
    """Mean and standard deviation over all voxels of all images, clipped to the window, air included.

    Args:
        images: Any shapes; read one at a time.
        window: (low, high), HU for CT.

    Returns:
        The normalisation; a standard deviation of 0 becomes 1.
    """
    count, total, squares = 0, 0.0, 0.0
    for image in images:
        for plane in image:
            values = np.clip(plane, *window).astype(np.float64)
            count += values.size
            total += float(values.sum())
            squares += float(np.square(values).sum())
    mean = total / max(count, 1)
    std = float(np.sqrt(max(squares / max(count, 1) - mean * mean, 0.0)))
    return Normalisation(window, mean, std or 1.0)


def own_normalisation(image: NDArray[Any]) -> Normalisation:
    """The normalisation of one MR case: its 0.5th to 99.5th percentile, then its own mean and standard deviation."""
    low, high = (float(value) for value in np.percentile(image[:: max(1, len(image) // 64)], (0.5, 99.5)))
    return fit_normalisation([image], (low, max(high, low + 1e-6)))
