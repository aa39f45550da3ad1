"""Orientation: between a file's voxel order and the one order used everywhere else, [Z, Y, X] in LPS (METHOD.md 0).

Only permutations and flips of axes, so every function is exact and its result a view. An oblique grid goes to the
nearest axes; what is left of its angle stays in the affine.
"""

from typing import Any

import nibabel.orientations
import numpy as np

orientations: Any = nibabel.orientations  # carries no types

_LPS = orientations.axcodes2ornt(("L", "P", "S"))
_FLIP_XY = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS mm <-> LPS mm
_REVERSE = np.eye(4)[[2, 1, 0, 3]]  # (x, y, z) <-> (z, y, x)


def to_canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Reorient a file's array to LPS.

    Args:
        array: [X, Y, Z] in the file's axis order.
        affine: 4 x 4, the file's voxel (x, y, z) -> world RAS, mm; not singular.

    Returns:
        A view [Z, Y, X]: x grows to the patient's left, y to posterior, z to superior.
    """
    to_lps = orientations.ornt_transform(orientations.io_orientation(affine), _LPS)
    return np.asarray(orientations.apply_orientation(array, to_lps)).T


def to_file(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The exact inverse of `to_canonical`.

    Args:
        array: [Z, Y, X], LPS.
        affine: 4 x 4, the file's voxel (x, y, z) -> world RAS, mm; not singular.

    Returns:
        A view [X, Y, Z] in the file's axis order.
    """
    to_axes = orientations.ornt_transform(_LPS, orientations.io_orientation(affine))
    return np.asarray(orientations.apply_orientation(array.T, to_axes))


def canonical_shape(shape: tuple[int, int, int], affine: np.ndarray) -> tuple[int, int, int]:
    """The shape [Z, Y, X] that `to_canonical` gives an array of the file's shape [X, Y, Z]."""
    z, y, x = to_canonical(np.broadcast_to(np.uint8(0), shape), affine).shape
    return z, y, x


def file_shape(shape: tuple[int, int, int], affine: np.ndarray) -> tuple[int, int, int]:
    """The shape [X, Y, Z] that `to_file` gives an array of the canonical shape [Z, Y, X]."""
    x, y, z = to_file(np.broadcast_to(np.uint8(0), shape), affine).shape
    return x, y, z


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel spacing (z, y, x) in mm of the canonical array of a file with this affine."""
    to_lps = orientations.ornt_transform(orientations.io_orientation(affine), _LPS)
    spacing = np.zeros(3)
    spacing[to_lps[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    return float(spacing[2]), float(spacing[1]), float(spacing[0])


def canonical_affine(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """Where the voxels of the canonical array lie: the batch's `index_to_mm` for a whole case.

    Args:
        shape: [Z, Y, X] of the canonical array.
        affine: 4 x 4, the file's voxel (x, y, z) -> world RAS, mm.

    Returns:
        4 x 4 float64, canonical index (z, y, x) -> position (z, y, x) in mm, LPS.
    """
    to_lps = orientations.ornt_transform(orientations.io_orientation(affine), _LPS)
    to_file_index = orientations.inv_ornt_aff(to_lps, file_shape(shape, affine))
    return np.asarray(_REVERSE @ _FLIP_XY @ affine @ to_file_index @ _REVERSE, dtype=np.float64)
