"""Where an organ is in a case that nobody annotated: what a coarse segmentation says, corrected (METHOD.md 2.3)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from organseg.priors.align import align
from organseg.priors.build import Box, bounding_box, box_start, cropped

_TOUCHING = np.ones((3, 3, 3), dtype=bool)


@dataclass(frozen=True, eq=False)
class Reference:
    """An annotated organ that coarse segmentations are moved onto.

    Attributes:
        case: Key.
        mask: bool [Z, Y, X] on the working grid, cropped to its bounding box.
    """

    case: str
    mask: NDArray[np.bool_]

    def __reduce__(self) -> tuple[object, ...]:
        """Ranks send each other bits."""
        return _unpacked, (self.case, self.mask.shape, np.packbits(self.mask).tobytes())


def _unpacked(case: str, shape: tuple[int, ...], bits: bytes) -> Reference:
    flat = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=int(np.prod(shape)))
    return Reference(case, flat.reshape(shape).astype(bool))


def coarse_centre(probs: NDArray[np.floating], least: float = 1) -> Box | None:
    """The bounding box [low, high) of the largest piece with probabilities of at least 0.5; None where there is none.

    Args:
        probs: [Z, Y, X] of one organ.
        least: Voxels of a piece that is more than a speck.
    """
    found = probs >= 0.5
    if not found.any():
        return None
    start, end = bounding_box(found)
    pieces, _ = ndimage.label(found[tuple(slice(a, b) for a, b in zip(start, end, strict=True))], _TOUCHING)
    sizes = np.bincount(pieces.ravel())[1:]
    if sizes.max() < least:
        return None
    low, high = bounding_box(pieces == sizes.argmax() + 1)
    return start + low, start + high


def corrected_centre(
    probs: NDArray[np.floating], coarse: Box, references: Sequence[Reference], max_shift: Sequence[int]
) -> NDArray[np.float64]:
    """The centre (z, y, x) of an organ in voxels: the coarse one, less the translation onto a reference.

    Args:
        probs: [Z, Y, X] of one organ.
        coarse: From `coarse_centre`.
        references: Each votes; the median counts.
        max_shift: Largest correction along each axis, in voxels.

    Returns:
        The coarse centre itself where there is no reference.
    """
    votes = []
    for reference in references:
        # Room for the mask wherever it is moved to, and for all that is around it.
        size = np.array(reference.mask.shape) + 2 * np.asarray(max_shift)
        around = (np.zeros(3, dtype=np.int64), np.array(reference.mask.shape))
        mask, there = cropped(reference.mask, size, around), cropped(probs, size, coarse)
        middle = box_start(*coarse, size) + (size - 1) / 2
        votes.append(middle - align(there, mask, max_shift))
    centre: NDArray[np.float64] = np.asarray(np.median(votes or [(coarse[0] + coarse[1] - 1) / 2], axis=0))
    return centre


def drawn(references: Sequence[Reference], case: str, seed: int, count: int) -> list[Reference]:
    """The references of a case: drawn by seed and case, so that nobody's order matters; never the case itself.

    A case counts by its id alone: `predict` does not know the data set.
    """
    name = case.rpartition("/")[2]

    def draw(reference: Reference) -> bytes:
        return hashlib.sha256(f"{seed}/{name}/{reference.case}".encode()).digest()

    others = (reference for reference in references if reference.case.rpartition("/")[2] != name)
    return sorted(others, key=draw)[:count]
