"""Which cases of a test to look at, and which of their slices, each ready to be drawn the radiological way.

Arrays of a case are [Z, Y, X] in LPS (METHOD.md 0): an axial slice is shown as it lies in memory (patient's right on
the picture's left, front on top), a coronal one upside down, since z grows to superior and rows are drawn downwards.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from organseg.batch import IGNORE
from organseg.data.cache import CachedCase, organ_boxes, organ_counts
from organseg.data.cohort import CohortCase
from organseg.errors import IntegrityError
from organseg.metrics import CaseRow
from organseg.volumes import linear_weights, read_label

_CT_WINDOW_HU = (-160.0, 240.0)
_MARGIN_MM = 40.0


@dataclass(frozen=True)
class ScoredCase:
    """A case as it was tested.

    Attributes:
        key: `<data set>/<id>`.
        image: [Z', Y', X'] on the working grid, HU or MR units.
        label: [Z, Y, X] on the source file's grid, 0..K in the run's channel order, or 255.
        preds: [Z, Y, X] likewise, 0..K.
        known: [K] bool: annotated in this case.
        spacing: mm (z, y, x) of the source grid.
        window: Intensities to show as black and white.
    """

    key: str
    image: NDArray[Any]
    label: NDArray[np.uint8]
    preds: NDArray[np.uint8]
    known: NDArray[np.bool_]
    spacing: tuple[float, float, float]
    window: tuple[float, float]


@dataclass(frozen=True)
class Slice:
    """One slice in the order in which it is drawn: first row on top, first column on the left.

    Attributes:
        caption: What it shows.
        top: Where its top is: `A` anterior or `H` head; the left is always the patient's right.
        image: [H, W].
        pixel_mm: (down, across).
    """

    caption: str
    top: str
    image: NDArray[Any]
    pixel_mm: tuple[float, float]


@dataclass(frozen=True)
class View(Slice):
    """A slice with what is true and what was found, [H, W] each."""

    label: NDArray[np.uint8]
    preds: NDArray[np.uint8]


def chosen_cases(rows: Sequence[CaseRow]) -> dict[str, str]:
    """`best`, `median` and `worst` -> case, by the case's mean DSC over its evaluated organs.

    Of two cases there is no median, of one only that. With an even number of cases the median is the worse of the two.
    """
    scores = defaultdict(list)
    for row in rows:
        if row.score.outcome != "unknown":
            scores[row.case].append(row.score.dsc)
    ranked = sorted(scores, key=lambda case: (-np.mean(scores[case]), case))
    last = len(ranked) - 1
    places = {-1: {}, 0: {"median": 0}, 1: {"best": 0, "worst": 1}}.get(
        last, {"best": 0, "median": len(ranked) // 2, "worst": last}
    )
    return {role: ranked[place] for role, place in places.items()}


def load_case(case_file: Path, predictions: Path, organs: Sequence[str]) -> ScoredCase:
    """Read a case from the cache, and what was predicted for it.

    Args:
        case_file: `CACHE/<data set>/<id>.h5`.
        predictions: `RUN/test/predictions/<data set>/<id>.nii.gz`.
        organs: Of the run, in channel order.

    Raises:
        IntegrityError: If the two do not belong together, or one is damaged.
    """
    cached = CachedCase(case_file)
    header = cached.header
    annotated = frozenset(header.annotated) & frozenset(organs)
    case = CohortCase(cached, header.key, annotated, tuple(organs))
    label = case.lookup[cached.source_label()]
    preds = read_label(predictions, case=header.key)[0].array
    if preds.shape != label.shape or preds.max(initial=0) > len(organs):
        raise IntegrityError(
            f"{predictions}: found a label map {preds.shape} with values to {preds.max(initial=0)}, expected "
            f"{label.shape} with values to {len(organs)}, as {case_file} and the table say; run `organseg test` again"
        )
    image = cached.arrays().image
    window = window_of(image, header.modality)
    return ScoredCase(header.key, image, label, preds, case.known, header.source_spacing, window)


def window_of(image: NDArray[Any], modality: str) -> tuple[float, float]:
    """Intensities to show as black and white: for abdominal CT, or of this MR image."""
    if modality == "CT":
        return _CT_WINDOW_HU
    low, high = np.percentile(image, (1, 99.5))
    return float(low), float(max(high, low + 1))


def views_of(case: ScoredCase) -> list[View]:
    """The axial slice with most organs, the one with most errors if it is another, and a coronal slice."""
    fullest, middle = busiest(case.label, len(case.known))
    wrong = np.array([disagreement(case, z) for z in range(len(case.label))])
    worst = int(wrong.argmax())
    most = f"largest disagreement\n({wrong[worst]} voxels)"
    if not wrong[worst]:
        axial = [_axial(case, fullest, "most organs")]
    elif fullest == worst:
        axial = [_axial(case, fullest, f"most organs, and\n{most}")]
    else:
        axial = [_axial(case, fullest, "most organs"), _axial(case, worst, most)]
    return [*axial, _coronal(case, middle)]


def busiest(label: NDArray[np.uint8], organs: int) -> tuple[int, int]:
    """Where to look: the axial slice z with most organs and most voxels, the coronal y amid the organs' centres."""
    counts = organ_counts(label, organs).astype(np.int64)
    voxels = counts.sum(axis=1)
    z = int(np.argmax((counts > 0).sum(axis=1) * (voxels.max() + 1) + voxels))
    boxes = organ_boxes(label, organs)
    centres = boxes[boxes.any(axis=(1, 2)), 1].sum(axis=1) / 2
    return z, int(centres.mean()) if len(centres) else label.shape[1] // 2


def disagreement(case: ScoredCase, z: int) -> int:
    """Voxels of an axial slice that the prediction has wrong; organs of unknown truth and ignored voxels cannot be."""
    organ_or_none = np.concatenate([[0], np.where(case.known, np.arange(1, len(case.known) + 1), 0)])
    label = case.label[z]
    return int(np.count_nonzero((organ_or_none[case.preds[z]] != label) & (label != IGNORE)))


def resampled_plane(image: NDArray[Any], shape: Sequence[int], axis: int, index: int) -> NDArray[np.float32]:
    """One plane of `volumes.resample_image(image, shape)`, before rounding, without the rest of the volume.

    Args:
        image: [Z, Y, X].
        shape: [Z', Y', X'] of the wanted grid.
        axis: Axis that the plane is perpendicular to.
        index: Of the plane, on the wanted grid.

    Returns:
        float32, the two other axes.
    """
    weights = [linear_weights(*sizes) for sizes in zip(image.shape, shape, strict=True)]
    row = weights.pop(axis)[index]
    taps = np.flatnonzero(row)
    plane = np.tensordot(row[taps], image.take(taps, axis=axis).astype(np.float32), (0, axis))
    resampled: NDArray[np.float32] = weights[0] @ plane @ weights[1].T
    return resampled


def _axial(case: ScoredCase, z: int, what: str) -> View:
    image = resampled_plane(case.image, case.label.shape, 0, z)
    caption = f"axial, z = {z} of 0..{len(case.label) - 1}\n{what}"
    return View(caption, "A", image, case.spacing[1:], case.label[z], case.preds[z])


def _coronal(case: ScoredCase, y: int) -> View:
    """Slice y; in z only what is near an organ, so that tall scans fit."""
    depth, height, _ = case.label.shape
    image = resampled_plane(case.image, case.label.shape, 1, y)
    occupied = np.flatnonzero([(case.label[z] > 0).any() or (case.preds[z] > 0).any() for z in range(depth)])
    margin = round(_MARGIN_MM / case.spacing[0])
    near = slice(max(0, occupied[0] - margin), occupied[-1] + margin + 1) if len(occupied) else slice(None)

    def upright(plane: NDArray[Any]) -> NDArray[Any]:
        return plane[near][::-1]

    label, preds = case.label[:, y], case.preds[:, y]
    caption = f"coronal, y = {y} of 0..{height - 1}\nmiddle of the organs"
    pixel_mm = (case.spacing[0], case.spacing[2])
    return View(caption, "H", upright(image), pixel_mm, upright(label), upright(preds))


def content_box(view: View, window: tuple[float, float]) -> tuple[slice, slice]:
    """Rows and columns of the body (the largest piece that is not black, so without the table) and of every label."""
    # Some data sets come with air clipped to a value inside the window.
    air = max(window[0], float(view.image.min()))
    bright = view.image > air + 0.05 * (window[1] - window[0])
    pieces, count = ndimage.label(bright)
    keep = (view.label > 0) | (view.preds > 0)
    if count:
        keep |= pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    if not keep.any():
        return slice(0, keep.shape[0]), slice(0, keep.shape[1])
    rows, columns = np.flatnonzero(keep.any(axis=1)), np.flatnonzero(keep.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
