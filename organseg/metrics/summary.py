"""From the scores of all cases to one line an organ, and one for their mean (METHOD.md 4).

How empty organs enter a mean changes its value more than most methods do, so each line carries the counts of the empty
cases, and `CONVENTIONS` is printed under each table.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from organseg.metrics.evaluate import OUTCOMES, OrganScore, Outcome

Metric = Literal["dsc", "hd_mm", "hd95_mm", "asd_mm", "nsd"]
METRICS: tuple[Metric, ...] = get_args(Metric)
DISTANCES: tuple[Metric, ...] = ("hd_mm", "hd95_mm", "asd_mm")

OVERALL = "mean"
"""What stands for the organ's name in the line of the mean over the organs."""

CONVENTIONS = """\
unknown (organ not annotated in the case): no value, in no mean.
both empty (annotated, absent, and not predicted): DSC and NSD 1, distances 0.
missed or false positive (one of the two is empty): DSC and NSD 0; in means each distance is {distance}.
mean: over an organ's cases; line 'mean': over the organs with at least one evaluated case, each weighing the same.
std: of the values that were averaged (ddof 1). Each mean stands also without the both-empty cases.
surface: voxel centres with a face neighbour outside; beyond the image is outside. Voxels labelled 255: in no organ."""
"""The conventions of every table; `conventions` fills in the distance."""


@dataclass(frozen=True)
class CaseRow:
    """One organ of one case, as a table of cases has it.

    Attributes:
        case: Case key.
        organ: Canonical name.
        score: Its scores.
        diagonal_mm: Length of the image's diagonal, mm.
    """

    case: str
    organ: str
    score: OrganScore
    diagonal_mm: float


@dataclass(frozen=True)
class Average:
    """A metric over cases (or, in the line of the mean, over organs); NaN where there is nothing to average.

    Attributes:
        mean: Mean.
        std: Standard deviation, ddof = 1; NaN below two values.
        mean_without_both_empty: Mean without the cases in which the organ is rightly absent.
    """

    mean: float
    std: float
    mean_without_both_empty: float


@dataclass(frozen=True)
class OrganSummary:
    """One line of a summary.

    Attributes:
        organ: Canonical name, or `OVERALL`.
        evaluated: Cases with a known truth, the sum of the last four counts.
        unknown: Cases that do not annotate the organ.
        both_empty: Cases where it is absent and was not predicted.
        missed: Cases where it was not predicted at all.
        false_positive: Cases where it is absent but was predicted.
        found: Cases where both have it: the only ones whose distances were measured.
        dsc: Dice score.
        hd_mm: Hausdorff distance, mm.
        hd95_mm: Its 95th percentile, mm.
        asd_mm: Average symmetric surface distance, mm.
        nsd: Normalised surface Dice.
    """

    organ: str
    evaluated: int
    unknown: int
    both_empty: int
    missed: int
    false_positive: int
    found: int
    dsc: Average
    hd_mm: Average
    hd95_mm: Average
    asd_mm: Average
    nsd: Average


def summary_text(lines: Sequence[OrganSummary]) -> str:
    """A summary as it is shown, with the conventions below it."""
    table = [
        f"\n{'organ':<26}{'cases':>6}{'DSC %':>8}{'std':>7}{'NSD %':>8}{'HD95 mm':>9}{'ASD mm':>8}"
        f"{'missed':>8}{'false':>7}{'absent':>8}"
    ]
    for line in lines:
        table.append(
            f"{line.organ:<26}{line.evaluated:>6}{100 * line.dsc.mean:>8.1f}{100 * line.dsc.std:>7.1f}"
            f"{100 * line.nsd.mean:>8.1f}{line.hd95_mm.mean:>9.1f}{line.asd_mm.mean:>8.1f}{line.missed:>8}"
            f"{line.false_positive:>7}{line.both_empty:>8}"
        )
    return "\n".join([*table, "", conventions()])


def conventions(empty_distance_mm: float | None = None) -> str:
    """The text to print under a table made with the same option as `summarise`."""
    replacement = "the diagonal of the image" if empty_distance_mm is None else f"{empty_distance_mm:g} mm"
    return CONVENTIONS.format(distance=replacement)


def summarise(rows: Sequence[CaseRow], *, empty_distance_mm: float | None = None) -> list[OrganSummary]:
    """Average the cases of each organ, then the organs.

    The mean over the organs is the mean of the organs' means, not of all rows nor of the cases' means: with partial
    labels the cases know different organs, and an organ that is rarely annotated still weighs as much as any other.
    Organs without an evaluated case are left out of it.

    Args:
        rows: One row a case and organ, in any order; of one fold or of several.
        empty_distance_mm: What replaces the distance of a missed or false-positive organ in means, mm; by default the
            diagonal of the row's image.

    Returns:
        One line an organ in order of first appearance, and the line `OVERALL` (counts are sums there).

    Raises:
        ValueError: If a case has an organ twice.
    """
    twice = [key for key, count in Counter((row.case, row.organ) for row in rows).items() if count > 1]
    if twice:
        msg = f"`rows` must have each organ of a case once, {twice[0]} is there more than once"
        raise ValueError(msg)
    organs = dict.fromkeys(row.organ for row in rows)
    lines = [_organ_line(organ, [row for row in rows if row.organ == organ], empty_distance_mm) for organ in organs]
    return [*lines, _overall_line(lines)]


def _organ_line(organ: str, rows: Sequence[CaseRow], empty_distance_mm: float | None) -> OrganSummary:
    """One organ over its cases."""
    counts = Counter(row.score.outcome for row in rows)
    known = [row for row in rows if row.score.outcome != "unknown"]
    averages = {metric: _over_cases(metric, known, empty_distance_mm) for metric in METRICS}
    return _line(organ, counts, averages)


def _over_cases(metric: Metric, known: Sequence[CaseRow], empty_distance_mm: float | None) -> Average:
    """Average a metric over the rows with a known truth."""
    values = np.array([_value(metric, row, empty_distance_mm) for row in known])
    present = np.array([row.score.outcome != "both_empty" for row in known], bool)
    return Average(_mean(values), _std(values), _mean(values[present]))


def _value(metric: Metric, row: CaseRow, empty_distance_mm: float | None) -> float:
    """A row's value in means: a distance that does not exist becomes a large one, so that missing never pays."""
    if metric in DISTANCES and row.score.outcome in ("missed", "false_positive"):
        return row.diagonal_mm if empty_distance_mm is None else empty_distance_mm
    value: float = getattr(row.score, metric)
    return value


def _overall_line(lines: Sequence[OrganSummary]) -> OrganSummary:
    """The mean over the organs."""
    averages = {metric: _over_organs([getattr(line, metric) for line in lines]) for metric in METRICS}
    counts = {outcome: sum(getattr(line, outcome) for line in lines) for outcome in OUTCOMES}
    return _line(OVERALL, counts, averages)


def _line(organ: str, counts: Mapping[Outcome, int], averages: Mapping[Metric, Average]) -> OrganSummary:
    """Put a line together."""
    return OrganSummary(
        organ=organ,
        evaluated=sum(counts[outcome] for outcome in OUTCOMES if outcome != "unknown"),
        unknown=counts["unknown"],
        both_empty=counts["both_empty"],
        missed=counts["missed"],
        false_positive=counts["false_positive"],
        found=counts["found"],
        dsc=averages["dsc"],
        hd_mm=averages["hd_mm"],
        hd95_mm=averages["hd95_mm"],
        asd_mm=averages["asd_mm"],
        nsd=averages["nsd"],
    )


def _over_organs(averages: Sequence[Average]) -> Average:
    """Average the organs' means; an organ without a value is NaN there, and left out."""
    means = np.array([average.mean for average in averages])
    present = np.array([average.mean_without_both_empty for average in averages])
    means, present = means[~np.isnan(means)], present[~np.isnan(present)]
    return Average(_mean(means), _std(means), _mean(present))


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _std(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else float("nan")
