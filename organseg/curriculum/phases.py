"""The steps of a curriculum's plan: their names, and what each of them draws."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["train", "confidence", "relabel"]


@dataclass(frozen=True)
class Phase:
    """One step of the plan."""

    index: int
    round_index: int
    kind: Kind

    @property
    def name(self) -> str:
        """Its folder in the run, and its name in the journal."""
        return f"{self.index:02d}_round{self.round_index}_{self.kind}"


def seed_of(seed: int, index: int, *more: int) -> int:
    """Of a phase, and of more networks in it; round 0 is seeded as a run without rounds is."""
    return seed if index == 0 else int(np.random.default_rng([seed, 3, index, *more]).integers(2**31))
