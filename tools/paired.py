"""Paired tests over cases: each method or network against the first, with Holm's correction."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from organseg.metrics import read_case_table
from organseg.metrics.statistics import PairedComparison, compare_paired, holm

Known = dict[tuple[str, str], float]
"""(organ, case) -> DSC."""
Scores = dict[str, dict[int, Known]]
"""Name -> seed -> DSC."""


def dsc_of(run: Path) -> Known:
    """A tested run's DSC; unknown organs left out."""
    rows = read_case_table(run / "test" / "cases.csv")
    return {(row.organ, row.case): row.score.dsc for row in rows if row.score.outcome != "unknown"}


def show_tests(found: Scores) -> None:
    """Each against the first, over cases; p-values with Holm's correction over the others."""
    first = next(iter(found))
    print(f"\nDifference to {first} in points of DSC, over cases (mean over organs and common seeds):")
    for name, one, p in tests_of(found, None):
        difference, interval = in_points(one)
        tests = f"t-test p {one.t_test_p:.2g}, Wilcoxon p {one.wilcoxon_p:.2g}, with Holm {p:.2g}"
        print(f"{name}: {difference} (95% {interval}), {one.cases} cases, {tests}")
    print("\nThe same for each organ, with Holm's correction over the others.")
    print("| organ | against | cases | difference | 95% | t-test p | Wilcoxon p | with Holm |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for organ in dict.fromkeys(organ for known in found[first].values() for organ, _ in known):
        for name, one, p in tests_of(found, organ):
            p_values = f"{one.t_test_p:.2g} | {one.wilcoxon_p:.2g} | {p:.2g}"
            print(f"| {organ} | {name} | {one.cases} | {' | '.join(in_points(one))} | {p_values} |")


def tests_of(found: Scores, organ: str | None) -> list[tuple[str, PairedComparison, float]]:
    """Name, its comparison with the first over the cases that both know, and Wilcoxon's p with Holm's correction.

    Args:
        found: See `Scores`.
        organ: The organ; None for the mean over all of them.
    """
    first, *others = found
    compared: dict[str, PairedComparison] = {}
    for other in others:
        seeds = found[first].keys() & found[other].keys()
        ours, theirs = (means_of([found[name][seed] for seed in seeds], organ) for name in (other, first))
        cases = sorted(ours.keys() & theirs.keys())
        if len(cases) > 1:
            compared[other] = compare_paired([ours[case] for case in cases], [theirs[case] for case in cases])
    corrected = holm([one.wilcoxon_p for one in compared.values()])
    return [(name, one, float(p)) for (name, one), p in zip(compared.items(), corrected, strict=True)]


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
