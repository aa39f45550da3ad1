"""Priors that a case's own annotation is not in, for training (ours; METHOD.md 2 has it in).

A network that is trained with a prior which its case's own mask helped to build learns to trust priors more than a test
case's deserves: at two annotated cases, half of the prior is the answer. Here the patients whose annotations an organ's
prior is built of are divided in two, and each sees the prior of the other half; everybody else sees that of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organseg.batch import WholeCase
from organseg.methods.organ_positions import Pools, Positioning
from organseg.priors import OrganPriors, Prior

ALL, FIRST, SECOND = range(3)
"""Whose prior a case sees."""


@dataclass(frozen=True, eq=False)
class Halves:
    """Priors of two halves of each organ's annotated cases."""

    first: OrganPriors
    second: OrganPriors

    @cached_property
    def seen(self) -> dict[str, NDArray[np.int64]]:
        """Case key -> [K]: whose prior of each organ it sees; cases that see those of all are left out."""
        found: dict[str, NDArray[np.int64]] = {}
        organs = len(self.first.priors)
        for half, other in ((self.first, SECOND), (self.second, FIRST)):
            for k in range(organs):
                for case in half.cases_of(k):
                    found.setdefault(case, np.full(organs, ALL))[k] = other
        return found

    @property
    def both(self) -> tuple[tuple[int, OrganPriors], ...]:
        """Each half and its number in `seen`."""
        return ((FIRST, self.first), (SECOND, self.second))

    def of(self, case: str, of_all: Sequence[Prior | None]) -> list[Prior | None]:
        """Of each organ, the prior that a case sees."""
        whose = self.seen.get(case, np.full(len(of_all), ALL))
        return [(of_all, self.first.priors, self.second.priors)[number][k] for k, number in enumerate(whose)]

    def centre(self, centres: NDArray[np.float32], case: WholeCase, positioning: Positioning) -> None:
        """Put the centres [K, 3] of a case's annotated organs where the priors that it sees fit."""
        for number, half in self.both if case.key in self.seen else ():
            theirs = self.seen[case.key] == number
            centres[theirs] = positioning.annotated(case, half)[theirs]

    def undivided(self, organs: Sequence[str], without: Sequence[str]) -> list[str]:
        """The organs whose prior everybody sees; those `without` one left out."""
        divided = {k for whose in self.seen.values() for k in np.flatnonzero(whose)}
        return [organ for k, organ in enumerate(organs) if k not in divided and organ not in without]

    def to_state(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [self.first.to_state(), self.second.to_state()]

    @classmethod
    def from_state(cls, state: Sequence[Mapping[str, Any]]) -> "Halves":
        """Of a checkpoint."""
        first, second = map(OrganPriors.from_state, state)
        return cls(first, second)


def half_pools(pools: Pools, patients: Mapping[str, str]) -> tuple[Pools, Pools]:
    """Every other patient of each organ, in the order of the cases' keys, and the others.

    An organ of one patient has no halves: its cases see the prior of all.

    Args:
        pools: From `pooled`.
        patients: Case key -> who it is.
    """
    halves = []
    for n in range(2):
        half = []
        for pool in pools:
            everyone = list(dict.fromkeys(patients[reference.case] for reference in pool))
            theirs = everyone[n::2] if len(everyone) > 1 else []
            half.append(tuple(reference for reference in pool if patients[reference.case] in theirs))
        halves.append(tuple(half))
    return halves[0], halves[1]
