"""Augmentation of 3D patches: rotation, translation, scaling and intensity (METHOD.md 0); no flips, ever.

A patch is cut out of a case and changed in one resampling: what the changes need beyond its borders is read from the
case instead of being invented. All geometry is one matrix from the patch's indices to the case's.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Size = tuple[int, int, int]


@dataclass(frozen=True)
class PatchAugmentation:
    """Ranges of the random changes to a patch; `None` in a data module switches all of them off.

    Attributes:
        rotation_degrees: Largest rotations about z (in the axial plane), y and x, to either side.
        scale: Smallest and largest zoom.
        shift: Largest translation to either side, as a share of the patch.
        gain: Smallest and largest factor of the normalised intensities; wide, see `SliceAugmentation`.
        offset: Largest shift of the normalised intensities to either side.
    """

    rotation_degrees: tuple[float, float, float] = (11.5, 5.0, 5.0)
    scale: tuple[float, float] = (0.85, 1.18)
    shift: float = 0.12
    gain: tuple[float, float] = (0.6, 1.4)
    offset: float = 0.2

    def matrix(self, rng: np.random.Generator, patch_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """A random change: mm (z, y, x, 1) from the patch's middle -> mm from its place in the case, [4, 4].

        Args:
            rng: Decides everything.
            patch_mm: Size of the patch, mm (z, y, x).
        """
        result = np.eye(4)
        for axis, most in enumerate(self.rotation_degrees):
            angle = np.deg2rad(rng.uniform(-most, most))
            one, other = (n for n in range(3) if n != axis)
            turn = np.eye(3)
            turn[[one, other], [one, other]] = np.cos(angle)
            turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
            result[:3, :3] = result[:3, :3] @ turn
        result[:3, :3] /= rng.uniform(*self.scale)
        result[:3, 3] = rng.uniform(-self.shift, self.shift, 3) * patch_mm
        return result

    def intensities(self, image: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """The image with a random gain and offset."""
        gain, offset = rng.uniform(*self.gain), rng.uniform(-self.offset, self.offset)
        return image * np.float32(gain) + np.float32(offset)


def needed_box(matrix: NDArray[np.float64], patch: Size, shape: Size) -> NDArray[np.int64]:
    """What of a case a patch needs.

    Args:
        matrix: [4, 4], index (z, y, x, 1) of the patch -> of the case.
        patch: [Z, Y, X] of the patch.
        shape: [Z, Y, X] of the case.

    Returns:
        [3, 2] box [lo, hi) inside the case; empty (lo = hi) where nothing of it is inside.
    """
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in patch))]) @ matrix.T
    low = np.clip(np.floor(corners.min(axis=0)[:3]).astype(int), 0, shape)
    high = np.clip(np.floor(corners.max(axis=0)[:3]).astype(int) + 2, low, shape)
    return np.stack([low, high], axis=1)


def resample(
    image: NDArray[np.float32], label: NDArray[np.uint8], matrix: NDArray[np.float64], patch: Size, floor: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A patch out of a part of a case.

    Args:
        image: [Z, Y, X] of the part, normalised.
        label: [Z, Y, X] likewise.
        matrix: [4, 4], index (z, y, x, 1) of the patch -> of the part.
        patch: [Z, Y, X] of the patch.
        floor: The image's value outside.

    Returns:
        Image (linear) and label (nearest; 0 outside), both of the patch's size.
    """
    if not image.size:
        return np.full(patch, floor, np.float32), np.zeros(patch, np.uint8)
    # grid_sample counts x, y, z from -1 to 1 between the outer borders of the first and last voxels.
    axes = [torch.arange(n, dtype=torch.float32) for n in patch]
    columns = []
    for row, length in reversed(list(zip(matrix[:3], image.shape, strict=True))):
        z, y, x, one = (float(value) for value in row)
        index = (axes[0] * z).view(-1, 1, 1) + (axes[1] * y).view(-1, 1) + (axes[2] * x + one)
        columns.append((2 * index + 1) / length - 1)
    grid = torch.stack(columns, dim=-1)[None]

    def sampled(volume: NDArray[np.float32], mode: str) -> NDArray[np.float32]:
        found = F.grid_sample(torch.from_numpy(volume)[None, None], grid, mode, "zeros", align_corners=False)
        return found[0, 0].numpy()

    moved = sampled(image - np.float32(floor), "bilinear") + np.float32(floor)
    return moved, sampled(label.astype(np.float32), "nearest").astype(np.uint8)
