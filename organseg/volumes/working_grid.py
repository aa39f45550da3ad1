"""The grid that a network sees: a scan's own, or resized in the plane, or resampled to a spacing in mm.

`prepare` and `predict` both come here, so that a new scan is sampled exactly as the training scans were.
"""

from dataclasses import dataclass

import numpy as np

from organseg.volumes.orientation import file_shape
from organseg.volumes.resample import resampled_affine


@dataclass(frozen=True)
class WorkingGrid:
    """How scans are resampled before a network sees them.

    Attributes:
        size: Rows and columns of each slice, or None for the scan's own; z stays.
        spacing: mm (z, y, x) to resample to, or None. At most one of the two is set.
    """

    size: int | None = None
    spacing: tuple[float, float, float] | None = None

    def shape(self, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> tuple[int, int, int]:
        """[Z, Y, X] of a scan on this grid, given its own shape and spacing; at least 1 in each axis."""
        if self.size is not None:
            return (shape[0], self.size, self.size)
        if self.spacing is not None:
            z, y, x = (max(1, round(n * own / new)) for n, own, new in zip(shape, spacing, self.spacing, strict=True))
            return (z, y, x)
        return shape


def spacing_on(
    new_shape: tuple[int, int, int], shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Spacing after resampling `shape` to `new_shape`: the extent stays, voxel borders on borders."""
    z, y, x = (own * n / new for own, n, new in zip(spacing, shape, new_shape, strict=True))
    return (z, y, x)


def affine_on(new_shape: tuple[int, int, int], shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """The affine of a file that holds the working grid in the voxel order of the scan's own file.

    The extent stays, voxel borders on borders, so the first voxel's centre moves by half the change of its size.

    Args:
        new_shape: [Z', Y', X'] of the working grid.
        shape: [Z, Y, X] of the scan.
        affine: 4 x 4, the scan's file: voxel (x, y, z) -> world RAS, mm.

    Returns:
        4 x 4 float64, for `write_label` and the others.
    """
    return resampled_affine(affine, file_shape(shape, affine), file_shape(new_shape, affine))
