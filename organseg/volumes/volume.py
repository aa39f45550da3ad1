"""One scan in memory (DESIGN.md 1): the array in the one canonical order, and the geometry of the file it came from.

The file's affine is kept unchanged, so that a prediction can be written back on exactly that grid.
"""

from dataclasses import dataclass

import numpy as np

from organseg.volumes.orientation import canonical_affine


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or label map.

    Attributes:
        array: [Z, Y, X], LPS: x grows to the patient's left, y to posterior, z to superior.
        spacing: (z, y, x) in mm.
        affine: 4 x 4 float64, the *file's* voxel (x, y, z) -> world RAS in mm, as in NIfTI.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """[Z, Y, X] of the array."""
        z, y, x = self.array.shape
        return z, y, x

    @property
    def index_to_mm(self) -> np.ndarray:
        """4 x 4 float64, index (z, y, x) of the array -> position (z, y, x) in mm, LPS."""
        return canonical_affine(self.shape, self.affine)
