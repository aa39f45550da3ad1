"""How good a round's pseudo-labels are, as tables (METHOD.md 1.5 and 1.6).

`cases.csv` has a row for each case and organ: what was added, its volume against what is plausible, its pieces; where
the truth is only hidden (`label_share`), also how much of it is right. `organs.csv` sums the rows up, with precision,
recall and the ranking metrics of the score and, beside it, of the probability, over all candidates. A round that found
nothing, or far more than there can be, is told and not trained on (FAULTS.md 5).
"""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from organseg.anatomy import ORGANS
from organseg.batch import RelabelSource
from organseg.curriculum.selection import TOUCHING
from organseg.data.pseudo_labels import PseudoLabels, RoundHeader, read_pseudo_labels
from organseg.errors import NumericsError
from organseg.files import publish_text
from organseg.metrics.ranking import ranking

MOST_TIMES = 10.0
"""More mean annotated volumes than this, added to a case in the mean, are no organ; on BTCV no round had 2."""


@dataclass(frozen=True)
class CaseRow:
    """One organ that a case does not annotate.

    Attributes:
        case: Case key.
        organ: Canonical name.
        candidates: Voxels that could have been added.
        added: Voxels that carry a pseudo-label of this organ now.
        added_now: Of these, those of this round; earlier ones stay with `accumulate`.
        volume_ml: Of all that carry one.
        taken_ml: Of all that is taken for the organ, added or not: a share of it would never look too large.
        plausible: Whether an adult's organ has that volume: `yes`, `low`, `high`; `none` where nothing was added,
            `unknown` of an organ whose volumes `anatomy` does not know.
        pieces: Connected components of what was added, by faces, edges and corners.
        right: Added voxels that the hidden truth confirms; empty where nothing is hidden.
        missing: Voxels of the hidden truth.
    """

    case: str
    organ: str
    candidates: int
    added: int
    added_now: int
    volume_ml: float
    taken_ml: float
    plausible: str
    pieces: int
    right: int | None
    missing: int | None


@dataclass(frozen=True)
class OrganRow:
    """One organ over all cases that lack it; rates are empty where no truth is hidden, or nothing was added.

    Precision and recall are of all that is added, also in earlier rounds. `score_*` are of what ranked the candidates,
    `probability_*` of what the probability would have ranked first; both are averaged around a candidate where the
    selection averages.
    """

    organ: str
    cases: int
    without_candidate: int
    candidates: int
    added: int
    added_now: int
    precision: float | None = None
    recall: float | None = None
    score_auc: float | None = None
    score_ap_success: float | None = None
    score_ap_error: float | None = None
    probability_auc: float | None = None
    probability_ap_success: float | None = None
    probability_ap_error: float | None = None


class RoundReport:
    """A round's tables, case by case.

    Args:
        folder: Of the phase.
        labels: Of the round's pseudo-labels.
        headers: Of all relabelled cases.
        source: Knows what is hidden.
    """

    def __init__(self, folder: Path, labels: Path, headers: Sequence[RoundHeader], source: RelabelSource) -> None:
        self.folder = folder
        self.labels = labels
        self.headers = headers
        self.source = source
        self.rows: list[CaseRow] = []
        self._ranked: dict[str, list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]]] = {}

    def add(self, header: RoundHeader) -> None:
        """Look at one case."""
        key, source = header.key, self.source
        voxels = read_pseudo_labels(self.labels, key)
        hidden = source.hidden_organs(key)
        truth = source.hidden_truth(key) if hidden.any() else None
        for channel in np.flatnonzero(source.unknown_organs(key)):
            inside = truth == channel + 1 if truth is not None and hidden[channel] else None
            self.rows.append(_case_row(header, int(channel), voxels, inside, source.voxel_ml(key)))
            if inside is not None:
                ours = voxels.candidate == channel + 1
                found = (voxels.score[ours], voxels.probability[ours], inside[ours])
                self._ranked.setdefault(header.organs[channel], []).append(found)

    def write(self) -> None:
        """Write the tables, print the second, and warn of organs that were found nowhere or far too large."""
        organs = self.headers[0].organs
        summary = [_organ_row(organ, self.rows, self._ranked.get(organ, [])) for organ in organs]
        summary = [row for row in summary if row.cases]
        self.folder.mkdir(parents=True, exist_ok=True)
        publish_text(self.folder / "cases.csv", _table(self.rows))
        publish_text(self.folder / "organs.csv", _table(summary))
        _show(self.headers[0], summary)
        empty = [row.organ for row in summary if not row.candidates]
        if empty:
            _warn(f"no candidate at all of {', '.join(empty)}: nothing was added for it in this round")
        for organ, times in added_times(self.headers, self.source).items():
            if times > MOST_TIMES:
                _warn(f"{organ}: {times:.0f} times its mean annotated volume was added to a case, in the mean")


def added_times(headers: Sequence[RoundHeader], source: RelabelSource) -> dict[str, float]:
    """What a round added to a case, in the mean of those that got any, as a multiple of the mean annotated volume.

    Returns:
        Organ -> multiple, 0 where nothing was added; without organs that nobody annotates, or everybody.
    """
    times = {}
    unknown = np.any([source.unknown_organs(header.key) for header in headers], axis=0)
    for channel, (organ, mean_ml) in enumerate(zip(headers[0].organs, source.mean_volumes_ml(), strict=True)):
        added = [header.added[channel] * source.voxel_ml(header.key) for header in headers if header.added[channel]]
        if unknown[channel] and np.isfinite(mean_ml):
            times[organ] = float(np.mean(added)) / mean_ml if added else 0.0
    return times


def refuse_collapse(headers: Sequence[RoundHeader], source: RelabelSource) -> None:
    """Stop before a training on pseudo-labels that say nothing.

    Raises:
        NumericsError: If no organ has a candidate, or too much was added of all organs of which that can be said.
    """
    remedy = "train round 0 longer (trainer.max_steps), or look at its predictions first"
    if not any(any(header.candidates) for header in headers):
        raise NumericsError(
            f"round {headers[0].round_index}: the network finds no candidate of any unlabelled organ; {remedy}"
        )
    times = added_times(headers, source)
    if times and min(times.values()) > MOST_TIMES:
        found = ", ".join(f"{organ} {more:.0f}" for organ, more in times.items())
        raise NumericsError(
            f"round {headers[0].round_index}: of every organ far more was added than where it is annotated (times its "
            f"mean volume: {found}); {remedy}; curriculum.selection.max_volume sets a limit"
        )


def _warn(what: str) -> None:
    print(f"organseg: warning: {what}", file=sys.stderr, flush=True)


def _case_row(
    header: RoundHeader, channel: int, voxels: PseudoLabels, inside: NDArray[np.bool_] | None, voxel_ml: float
) -> CaseRow:
    organ = header.organs[channel]
    mask = voxels.label == channel + 1
    added = int(mask.sum())
    volume, taken = added * voxel_ml, int((mask | (voxels.candidate == channel + 1)).sum()) * voxel_ml
    right = None if inside is None else int((mask & inside).sum())
    missing = None if inside is None else int(inside.sum())
    body = ndimage.find_objects(mask.view(np.uint8))
    pieces = int(ndimage.label(mask[body[0]], TOUCHING)[1]) if body else 0
    counts = (header.candidates[channel], added, header.added[channel])
    volumes = (round(volume, 2), round(taken, 2))
    plausible = _plausible(organ, taken) if added else "none"
    return CaseRow(header.key, organ, *counts, *volumes, plausible, pieces, right, missing)


def _plausible(organ: str, volume_ml: float) -> str:
    if organ not in ORGANS:
        return "unknown"
    low, high = ORGANS[organ].volume_ml
    return "low" if volume_ml < low else "high" if volume_ml > high else "yes"


def _organ_row(
    organ: str,
    rows: Sequence[CaseRow],
    ranked: Sequence[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]],
) -> OrganRow:
    ours = [row for row in rows if row.organ == organ]
    known = [row for row in ours if row.right is not None]
    added, right = sum(row.added for row in known), sum(row.right or 0 for row in known)
    missing = sum(row.missing or 0 for row in known)
    numbers: list[float | None] = [None] * 6
    if ranked:
        score, probability, correct = (np.concatenate(part) for part in zip(*ranked, strict=True))
        numbers = [_rate(value) for kind in (score, probability) for value in asdict(ranking(kind, correct)).values()]
    return OrganRow(
        organ,
        len(ours),
        sum(not row.candidates for row in ours),
        sum(row.candidates for row in ours),
        sum(row.added for row in ours),
        sum(row.added_now for row in ours),
        _rate(right / added) if added else None,
        _rate(right / missing) if missing else None,
        *numbers,
    )


def _rate(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def _table(rows: Sequence[CaseRow] | Sequence[OrganRow]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([field.name for field in fields(rows[0])])
        writer.writerows([["" if value is None else value for value in asdict(row).values()] for row in rows])
    return text.getvalue()


def _show(header: RoundHeader, rows: Sequence[OrganRow]) -> None:
    """One line an organ; `so far` is what earlier rounds added too, where that stays."""
    share = f"{100 * header.gamma:.0f}%"
    print(f"\nround {header.round_index}: of the candidates, at most the {share} with the highest score")
    several = any(row.added != row.added_now for row in rows)
    known = any(row.precision is not None for row in rows)
    head = f"{'organ':<26}{'cases':>6}{'candidates':>12}{'added':>10}" + f"{'so far':>10}" * several
    print(head + f"{'precision':>11}{'recall':>8}{'AUC':>7}{'of p':>8}" * known)
    for row in rows:
        rates = [f"{100 * value:.1f}" if value is not None else "" for value in (row.precision, row.recall)]
        aucs = [f"{auc:.2f}" if auc is not None else "" for auc in (row.score_auc, row.probability_auc)]
        print(
            f"{row.organ:<26}{row.cases:>6}{row.candidates:>12}{row.added_now:>10}"
            + f"{row.added:>10}" * several
            + f"{rates[0]:>11}{rates[1]:>8}{aucs[0]:>7}{aucs[1]:>8}".rstrip()
        )
