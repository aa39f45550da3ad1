"""One case against its truth, organ by organ, with a name for every way in which an organ can be empty (METHOD.md 4).

Partial labels add a case that other tools do not know: an organ that nobody annotated in this scan is *unknown*, which
is neither absent nor background. It has no value, whatever was predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from organseg.batch import IGNORE
from organseg.metrics.overlap import dsc, overlap_counts
from organseg.metrics.surface import SurfaceScores, check_spacing, organ_boxes, surface_scores

Outcome = Literal["unknown", "both_empty", "missed", "false_positive", "found"]
"""`unknown`: not annotated; `both_empty`: rightly not predicted; `missed`: truth only; `false_positive`: preds only."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

_NAN = float("nan")


@dataclass(frozen=True)
class OrganScore:
    """The scores of one organ in one case; a value that does not exist is NaN, never 0.

    Attributes:
        outcome: Which of the five cases this is; it decides what the scores mean.
        dsc: Dice score, in [0, 1].
        hd_mm: Hausdorff distance, mm.
        hd95_mm: Its 95th percentile, mm.
        asd_mm: Average symmetric surface distance, mm.
        nsd: Normalised surface Dice, in [0, 1].
        preds_volume_ml: Predicted volume without ignore voxels, mL.
        label_volume_ml: True volume without ignore voxels, mL.
    """

    outcome: Outcome
    dsc: float
    hd_mm: float
    hd95_mm: float
    asd_mm: float
    nsd: float
    preds_volume_ml: float
    label_volume_ml: float


UNKNOWN = OrganScore("unknown", _NAN, _NAN, _NAN, _NAN, _NAN, _NAN, _NAN)
"""The score of an organ that the case does not annotate."""


def evaluate_case(
    preds: NDArray[np.uint8],
    label: NDArray[np.uint8],
    annotated: Sequence[bool] | NDArray[np.bool_],
    spacing: Sequence[float],
    tolerance_mm: float = 2.0,
) -> list[OrganScore]:
    """Score every organ of one case on the source file's grid.

    Args:
        preds: uint8 [Z, Y, X], values 0..K.
        label: uint8 [Z, Y, X], values 0..K, or 255 where the truth is unknown for all: these voxels belong to no organ,
            in both maps.
        annotated: K flags; False means that the organ's truth is unknown in this case.
        spacing: (z, y, x), mm.
        tolerance_mm: Tolerance of the NSD, mm.

    Returns:
        K scores in label order.

    Raises:
        ValueError: If dtypes, shapes, values or the spacing do not fit.
    """
    organs = len(annotated)
    counts = overlap_counts(preds, label, organs)
    voxel_ml = float(np.prod(check_spacing(spacing, label.ndim))) / 1000
    overlaps = dsc(counts)
    boxes = organ_boxes(preds, label, organs)
    scores = []
    for k, known in enumerate(annotated):
        outcome = _outcome(bool(known), int(counts.preds[k]), int(counts.label[k]))
        if outcome == "unknown":
            scores.append(UNKNOWN)
            continue
        if outcome == "found":
            ours, truth = preds[boxes[k]], label[boxes[k]]
            distances = surface_scores((ours == k + 1) & (truth != IGNORE), truth == k + 1, spacing, tolerance_mm)
        else:
            distances = _EMPTY[outcome]
        score = OrganScore(
            outcome=outcome,
            dsc=float(overlaps[k]),
            hd_mm=distances.hd_mm,
            hd95_mm=distances.hd95_mm,
            asd_mm=distances.asd_mm,
            nsd=distances.nsd,
            preds_volume_ml=float(counts.preds[k]) * voxel_ml,
            label_volume_ml=float(counts.label[k]) * voxel_ml,
        )
        scores.append(score)
    return scores


def diagonal_mm(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length of an image's diagonal, outer face to outer face: more than any distance between two of its voxels.

    Args:
        shape: (Z, Y, X), voxels.
        spacing: (z, y, x), mm.

    Returns:
        Diagonal, mm.
    """
    return float(np.linalg.norm(np.asarray(shape) * check_spacing(spacing, len(shape))))


_EMPTY: dict[Outcome, SurfaceScores] = {
    "both_empty": SurfaceScores(0.0, 0.0, 0.0, 1.0),
    "missed": SurfaceScores(_NAN, _NAN, _NAN, 0.0),
    "false_positive": SurfaceScores(_NAN, _NAN, _NAN, 0.0),
}


def _outcome(known: bool, preds_voxels: int, label_voxels: int) -> Outcome:
    """Name what happened to an organ."""
    if not known:
        return "unknown"
    if preds_voxels and label_voxels:
        return "found"
    if label_voxels:
        return "missed"
    return "false_positive" if preds_voxels else "both_empty"
