"""Paired tests over cases: each method or network against the first, with Holm's correction."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from organseg.metrics import CaseRow, read_case_table
from organseg.metrics.statistics import PairedComparison, compare_paired, holm

PRESENT = ("found", "missed")
"""Outcomes of an organ that a case has: one that it lacks gives 1 or 0, and decides all of a mean."""
Known = dict[tuple[str, str], float]
"""(organ, case) -> DSC."""
Scores = dict[str, dict[Hashable, Known]]
"""Name -> seed (or fold and seed) -> DSC."""


def dsc_of(run: Path) -> Known:
    """A tested run's DSC of the organs that a case has."""
    return known_of(read_case_table(run / "test" / "cases.csv"))


def known_of(rows: Iterable[CaseRow]) -> Known:
    """The same of a table's lines."""
    return {(row.organ, row.case): row.score.dsc for row in rows if row.score.outcome in PRESENT}


def show_tests(found: Scores) -> None:
    """Each against the first, over cases and organs of both; p-values with Holm's correction over the others."""
    first = next(iter(found))
    print(
        f"\nDifference to {first} in points of DSC, over cases (mean over the organs that a case has, and over common"
    )
    print(f"seeds); p with Holm's correction over the {len(found) - 1} others:")
    for name, one, (t, wilcoxon) in tests_of(found, None):
        difference, interval = in_points(one)
        least = min(1.0, (len(found) - 1) * 2.0 ** (1 - one.cases))
        bound = f"; {one.cases} cases cannot give less than {least:.2g}" if least > 0.01 else ""
        tests = f"t-test p {t:.2g}, Wilcoxon p {wilcoxon:.2g}{bound}"
        print(f"{name}: {difference} (95% {interval}), {one.cases} cases, {tests}")
    print("\nThe same for each organ.")
    print("| organ | against | cases | difference | 95% | t-test p | Wilcoxon p |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for organ in dict.fromkeys(organ for known in found[first].values() for organ, _ in known):
        for name, one, (t, wilcoxon) in tests_of(found, organ):
            print(f"| {organ} | {name} | {one.cases} | {' | '.join(in_points(one))} | {t:.2g} | {wilcoxon:.2g} |")


def tests_of(found: Scores, organ: str | None) -> list[tuple[str, PairedComparison, tuple[float, float]]]:
    """Name, its comparison with the first over the cases that both know, and both tests' p with Holm's correction.

    Args:
        found: See `Scores`.
        organ: The organ; None for the mean over all of them.
    """
    first, *others = found
    compared: dict[str, PairedComparison] = {}
    for other in others:
        seeds = sorted(found[first].keys() & found[other].keys(), key=str)
        both = [found[first][seed].keys() & found[other][seed].keys() for seed in seeds]  # organs of both
        ours, theirs = (
            means_of(
                [{key: found[name][seed][key] for key in keys} for seed, keys in zip(seeds, both, strict=True)], organ
            )
            for name in (other, first)
        )
        cases = sorted(ours.keys() & theirs.keys())
        if len(cases) > 1:
            compared[other] = compare_paired([ours[case] for case in cases], [theirs[case] for case in cases])
    t_tests = holm([one.t_test_p for one in compared.values()])
    wilcoxons = holm([one.wilcoxon_p for one in compared.values()])
    corrected = zip(t_tests.tolist(), wilcoxons.tolist(), strict=True)
    return [(name, one, pair) for (name, one), pair in zip(compared.items(), corrected, strict=True)]


def means_of(seeds: Sequence[Known], organ: str | None) -> dict[str, float]:
    """Case -> its mean over seeds, and over organs where none is named."""
    values: dict[str, list[float]] = defaultdict(list)
    for known in seeds:
        for (of, case), value in known.items():
            if organ in (None, of):
                values[case].append(value)
    return {case: fmean(some) for case, some in values.items()}


def in_points(one: PairedComparison) -> tuple[str, str]:
    """The difference and its interval, in points of DSC."""
    low, mean, high = (f"{100 * value:+.1f}" for value in (one.low, one.mean_difference, one.high))
    return mean, f"{low} to {high}"
