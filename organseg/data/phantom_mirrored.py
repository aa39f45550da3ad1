"""A cohort in which local appearance says nothing: half of the patients are mirrored (situs inversus).

Spleen and gallbladder are two blobs that look the same, on the left and on the right of the back. Which is which
depends on where the liver is: the gallbladder is on its side, the spleen on the other. The liver is a small mark in
front, in every slice, more than 100 mm from both. A network whose units see less than that can find the blobs and must
guess their names; attention can look.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from organseg.data.phantom_shapes import grain

if TYPE_CHECKING:
    from organseg.data.phantom_patient import Shape

MIRRORED_LABELS = {1: "liver", 2: "gallbladder", 3: "spleen"}
EXTENT_MM = (160.0, 320.0, 320.0)
_AIR_HU, _BODY_HU, _BLOB_HU, _LIVER_HU, _NOISE_HU = -1000.0, 0.0, 80.0, 160.0, 25.0


def make_mirrored_case(
    seed: int, index: int, shape: "Shape"
) -> tuple[NDArray[np.int16], NDArray[np.uint8], tuple[float, float, float]]:
    """Image (HU) and label [Z, Y, X] in LPS, and spacing in mm; a pure function of its arguments."""
    rng = np.random.default_rng((seed, index, 2))
    depth, height, width = (extent / n for extent, n in zip(EXTENT_MM, shape, strict=True))
    spacing = (depth, height, width)
    z, y, x = np.ogrid[tuple(slice(0, n) for n in shape)]
    place = [(axis + 0.5) * step - extent / 2 for axis, step, extent in zip((z, y, x), spacing, EXTENT_MM, strict=True)]
    hu = np.where(_ellipsoid(place, (0, 0, 0), (1e9, 130, 152)), _BODY_HU, _AIR_HU).astype(np.float32)
    label = np.zeros(shape, dtype=np.uint8)
    liver_side = (-1, 1)[rng.integers(2)]  # x grows to the patient's left

    def paint(value: int, mm: tuple[float, float, float], radii: tuple[float, float, float], of_hu: float) -> None:
        where = np.broadcast_to(_ellipsoid(place, mm, radii), shape)
        hu[where], label[where] = of_hu, value

    paint(1, (0, -95 + _moved(rng), liver_side * (25 + _moved(rng))), (1e9, 13, 13), _LIVER_HU)
    for value, side in ((2, liver_side), (3, -liver_side)):
        middle = (4 * _moved(rng), 72 + _moved(rng), side * (72 + _moved(rng)))
        size = 24 * rng.uniform(0.85, 1.15)
        paint(value, middle, (2.2 * size, size, size), _BLOB_HU)
    hu += _NOISE_HU * grain(rng, shape, 0.6)
    return np.rint(hu).astype(np.int16), label, spacing


def _moved(rng: np.random.Generator) -> float:
    return float(np.clip(rng.normal(0, 4), -8, 8))


def _ellipsoid(
    place: Sequence[NDArray[np.floating[Any]]], middle: tuple[float, float, float], radii: tuple[float, float, float]
) -> NDArray[np.bool_]:
    z, y, x = (((axis - at) / radius) ** 2 for axis, at, radius in zip(place, middle, radii, strict=True))
    inside: NDArray[np.bool_] = z + y + x <= 1
    return inside
