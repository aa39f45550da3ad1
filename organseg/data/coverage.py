"""Who labels what: the summary that `fit` shows before it trains (METHOD.md 1.7; PEERS.md 3, pains 1 and 2).

Organs of several data sets are matched by name, so a table by name shows what the run will learn from; and an organ
that nobody annotates, or that has no negative voxel anywhere, is told before hours are spent on it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from organseg.batch import IGNORE
from organseg.data.cohort import Cohort, CohortCase


def coverage(cohort: Cohort) -> str:
    """Data sets with their numbers of cases, organs with the training cases that annotate them, and warnings.

    Args:
        cohort: The cases of the run; a label hidden by `label_share` counts as not annotated.

    Returns:
        Lines of text, the warnings last.
    """
    parts = {"training": cohort.train, "validation": cohort.val, "test": cohort.test}
    names = sorted({_dataset(case) for cases in parts.values() for case in cases})
    width = max(len(text) for text in (*names, *cohort.organs, "data set"))
    lines = [f"{'data set':<{width}}{''.join(f'{part:>12}' for part in parts)}  cases; labels"]
    for name in names:
        members = {part: [case for case in cases if _dataset(case) == name] for part, cases in parts.items()}
        counts = "".join(f"{len(cases):>12}" for cases in members.values())
        lines.append(f"{name:<{width}}{counts}  {_labels(members, cohort.organs)}")
    lines.append(f"{'organ':<{width}}   annotated in, of {len(cohort.train)} training cases")
    lines += [f"{organ:<{width}}{_annotated(organ, cohort.train)}" for organ in cohort.organs]
    return "\n".join([*lines, *(f"organseg: warning: {text}" for text in _warnings(cohort))])


def _dataset(case: CohortCase) -> str:
    return case.key.rpartition("/")[0]


def _labels(members: Mapping[str, Sequence[CohortCase]], organs: Sequence[str]) -> str:
    """The organs of the run that some case of a data set annotates."""
    known = {organ for cases in members.values() for case in cases for organ in case.annotated}
    return ", ".join(organ for organ in organs if organ in known) or "nothing"


def _annotated(organ: str, cases: Sequence[CohortCase]) -> str:
    """In how many cases an organ is annotated, over all and by data set."""
    by_set: dict[str, list[bool]] = {}
    for case in cases:
        by_set.setdefault(_dataset(case), []).append(organ in case.annotated)
    total = sum(sum(known) for known in by_set.values())
    each = ", ".join(f"{sum(known)} of {len(known)} in {name}" for name, known in by_set.items())
    return f"{total:>12}" + (f"  ({each})" if len(by_set) > 1 else "")


def _warnings(cohort: Cohort) -> list[str]:
    """What of the run's organs cannot be learned."""
    voxels = _known_voxels(cohort)
    warnings = []
    for channel, organ in enumerate(cohort.organs):
        ours = [case for case in cohort.train if organ in case.annotated]
        if not ours:
            warnings.append(
                f"{organ}: no training case annotates it, so it is never learned; leave it out of `organs`, or add "
                "cases that annotate it (`datasets`, `label_share`)"
            )
        elif not voxels[channel]:
            warnings.append(
                f"{organ}: no training case that annotates it has a voxel of it, so it is learned as absent; check its "
                "label files"
            )
        elif sum(voxels) == voxels[channel] and not any(_shows_another(case, channel) for case in ours):
            warnings.append(
                f"{organ}: no voxel is known not to be it (all others are 255, ignore), so it is predicted everywhere; "
                "label background as 0 in some cases"
            )
    return warnings


def _known_voxels(cohort: Cohort) -> list[int]:
    """[K] labelled voxels of the training cases, as this run may see them."""
    totals = [0] * len(cohort.organs)
    for case in cohort.train:
        counts = case.cached.organ_counts.sum(axis=0)
        for channel, column in case.columns():
            totals[channel] += int(counts[column])
    return totals


def _shows_another(case: CohortCase, channel: int) -> bool:
    """Whether a case that annotates an organ has a voxel that is known not to be it."""
    values = np.unique(case.lookup[case.cached.arrays().label]).tolist()
    return bool(set(values) - {channel + 1, IGNORE})
