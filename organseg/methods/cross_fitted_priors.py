"""Priors that a case's own annotation is not in, for training (ours; METHOD.md 2 has it in).

A network that is trained with a prior which its case's own mask helped to build learns to trust priors more than a test
case's deserves: at two annotated cases, half of the prior is the answer. Here each organ's annotated cases are divided
in two, and each of them sees the prior of the other half; the priors of all are for who annotates nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from organseg.methods.organ_positions import Pools, Positioning, learned_priors
from organseg.priors import OrganPriors

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

    def to_state(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [self.first.to_state(), self.second.to_state()]

    @classmethod
    def from_state(cls, state: Sequence[Mapping[str, Any]]) -> "Halves":
        """Of a checkpoint."""
        first, second = map(OrganPriors.from_state, state)
        return cls(first, second)


def half_priors(pools: Pools, organs: Sequence[str], positioning: Positioning, bins: int | Literal["all"]) -> Halves:
    """Priors of every other case of each organ, in the order of the keys, and of the others; arguments as there."""
    halves = [learned_priors(tuple(pool[n::2] for pool in pools), organs, positioning, bins) for n in range(2)]
    first, second = (replace(half, references=((),) * len(organs)) for half in halves)
    return Halves(first, second)
