"""A case of a relabelling round, and which of its slices to look at (METHOD.md 1.5).

Everything lies on the cache's grid, where pseudo-labels are made; slices are shown as in `views`. Truth that the run
was not shown (`label_share`) is read here, for pictures only.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from organseg.data.cache import CachedCase
from organseg.data.cohort import CohortCase
from organseg.data.pseudo_labels import PseudoLabels, path_of, read_pseudo_labels, read_round_header
from organseg.errors import IntegrityError
from organseg.report.round_tables import CaseLine
from organseg.report.views import Slice, window_of

_REMEDY = "correct data.init_args.cache in the run's config.yaml, or move pseudo_labels away for a report without them"
_TOUCHING = np.ones((3, 3, 3), dtype=bool)
_MARGIN_MM, _LEAST_MM = 30.0, 140.0


@dataclass(frozen=True)
class RelabelledCase:
    """A training case that lacks organs.

    Attributes:
        key: `<data set>/<id>`.
        organs: Of the run, in channel order.
        image: [Z, Y, X], HU or MR units.
        truth: [Z, Y, X], 0..K or 255: what the cache knows, also what the run was not shown.
        annotated: [Z, Y, X] likewise: what the run was shown.
        known: [K] bool: organs in `truth`.
        shown: [K] bool: organs in `annotated`.
        spacing: mm (z, y, x).
        window: Intensities to show as black and white.
    """

    key: str
    organs: tuple[str, ...]
    image: NDArray[Any]
    truth: NDArray[np.uint8]
    annotated: NDArray[np.uint8]
    known: NDArray[np.bool_]
    shown: NDArray[np.bool_]
    spacing: tuple[float, float, float]
    window: tuple[float, float]

    def axial(self, z: int) -> Slice:
        """Slice z as it is drawn."""
        return Slice(f"axial, z = {z} of 0..{len(self.image) - 1}", "A", self.image[z], self.spacing[1:])

    def coronal(self, y: int) -> Slice:
        """The coronal slice through row y, head on top."""
        caption = f"coronal, y = {y} of 0..{self.image.shape[1] - 1}"
        return Slice(caption, "H", upright(self.image, y), (self.spacing[0], self.spacing[2]))


def upright(volume: NDArray[Any], y: int) -> NDArray[Any]:
    """[Z, Y, X] -> the coronal slice y as it is drawn: z grows to the head, rows go down."""
    return volume[::-1, y]


def load_relabelled(case_file: Path, labels: Path, unknown: Collection[str]) -> RelabelledCase:
    """Read a case from the cache.

    Args:
        case_file: `CACHE/<data set>/<id>.h5`.
        labels: A round's folder; its file of the case says which organs the run has, in which order.
        unknown: Organs that the run was not shown in this case.

    Raises:
        IntegrityError: If one is damaged.
    """
    cached = CachedCase(case_file)
    header = cached.header
    organs = read_round_header(labels, header.key).organs
    offered = frozenset(header.annotated) & frozenset(organs)
    everything = CohortCase(cached, header.key, offered, organs)
    shown = CohortCase(cached, header.key, offered - frozenset(unknown), organs)
    arrays = cached.arrays()
    window = window_of(arrays.image, header.modality)
    return RelabelledCase(
        header.key,
        organs,
        arrays.image,
        everything.lookup[arrays.label],
        shown.lookup[arrays.label],
        everything.known,
        shown.known,
        header.spacing,
        window,
    )


def load_labels(labels: Path, case: RelabelledCase, lines: Collection[CaseLine]) -> PseudoLabels:
    """A round's pseudo-labels of a case.

    Args:
        labels: The round's folder.
        case: Whose.
        lines: The case's lines in the round's table.

    Raises:
        IntegrityError: If the file is damaged, or is not of this case or of this table.
    """
    voxels = read_pseudo_labels(labels, case.key)
    if voxels.label.shape != case.image.shape:
        raise IntegrityError(
            f"{path_of(labels, case.key)}: found pseudo-labels {voxels.label.shape}, expected {case.image.shape} as "
            f"the case has in the cache; {_REMEDY}"
        )
    for line in lines:
        found = int(np.count_nonzero(voxels.label == channel_of(case, line) + 1))
        if found != line.added:
            raise IntegrityError(
                f"{path_of(labels, case.key)}: found {found} voxels of {line.organ}, expected {line.added} as the "
                "round's cases.csv says; restore what was changed, or move pseudo_labels away for a report without them"
            )
    return voxels


def channel_of(case: RelabelledCase, line: CaseLine) -> int:
    """Of the line's organ.

    Raises:
        IntegrityError: If the run has no such organ, or its hidden truth is not in the cache.
    """
    if line.organ not in case.organs:
        raise IntegrityError(
            f"{case.key}: a round's cases.csv names {line.organ}, expected one of {', '.join(case.organs)}; restore it"
        )
    channel = case.organs.index(line.organ)
    if line.right is not None and not case.known[channel]:
        raise IntegrityError(
            f"{case.key}: the cache does not annotate {line.organ}, whose truth the run's cases.csv has; {_REMEDY}"
        )
    return channel


def fullest(mask: NDArray[np.bool_]) -> int:
    """The axial slice with most voxels of a mask [Z, Y, X], the lowest of equally full ones."""
    return int(mask.sum(axis=(1, 2)).argmax())


def piece_of(candidates: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The connected piece of the candidates [Z, Y, X] that all chosen ones lie in; all candidates if they do not."""
    pieces = ndimage.label(candidates, _TOUCHING)[0]
    found = np.unique(pieces[chosen])
    return pieces == found[0] if len(found) == 1 else candidates


def likely_choice(voxels: PseudoLabels, candidates: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """The most probable candidates, ties by index: what the probability (MCP) would add in the score's place."""
    places = np.flatnonzero(candidates)
    ranked = places[np.argsort(-voxels.probability.ravel()[places], kind="stable")]
    chosen = np.zeros(candidates.size, dtype=bool)
    chosen[ranked[:count]] = True
    return chosen.reshape(candidates.shape)


def frame_of(mask: NDArray[np.bool_], pixel_mm: tuple[float, float]) -> tuple[float, float, float, float]:
    """A square (top, bottom, left, right) in mm around a mask [H, W], moved into the picture where it fits."""
    sizes = [n * mm for n, mm in zip(mask.shape, pixel_mm, strict=True)]
    spans = []
    for axis, mm in enumerate(pixel_mm):
        places = np.flatnonzero(mask.any(axis=1 - axis))
        spans.append((places[0] * mm, (places[-1] + 1) * mm) if len(places) else (0.0, sizes[axis]))
    side = max(_LEAST_MM, *(stop - start + 2 * _MARGIN_MM for start, stop in spans))
    side = min(side, max(sizes))
    corners = []
    for (start, stop), size in zip(spans, sizes, strict=True):
        low = (start + stop - side) / 2
        corners.append(float(min(max(low, 0.0), size - side) if side <= size else (size - side) / 2))
    return corners[0], corners[0] + side, corners[1], corners[1] + side
