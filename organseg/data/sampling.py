"""Which slice stands at which position of which batch: a pure function of seed, phase and position.

Training has no state of its own. A batch is `batch_size` positions; those in its first half walk through all slices in
passes (each pass a new permutation), the others draw an organ first and then a slice that shows it, in a case that
annotates it or has pseudo-labels of it. So a resumed run, another number of workers and another number of ranks see
the same global batches.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Draw:
    """One training sample.

    Attributes:
        case: Its number.
        z: The slice.
        rng: Decides all else of the sample, its augmentation too.
        organ: Channel of the organ that it was drawn for; None where it was not.
    """

    case: int
    z: int
    rng: np.random.Generator
    organ: int | None = None


@dataclass(frozen=True)
class SlicePlan:
    """The order of all training slices.

    Attributes:
        slices: [N, 2] (case, z) of every slice.
        by_organ: Channel -> [n, 2] (case, z) of slices that show the organ, or have pseudo-labels of it; none empty.
        batch_size: Positions in a global batch.
        seed: Of the run.
        phase: Index of the training phase (0, unless a curriculum drives).
    """

    slices: NDArray[np.int64]
    by_organ: Mapping[int, NDArray[np.int64]]
    batch_size: int
    seed: int
    phase: int = 0

    @property
    def walked(self) -> int:
        """Positions of a batch that walk through all slices; the rest draws by organ. A batch of 1 takes turns."""
        return self.batch_size if not self.by_organ else (self.batch_size + 1) // 2

    @property
    def _alternates(self) -> bool:
        return self.batch_size == 1 and bool(self.by_organ)

    def draw(self, step: int, position: int) -> Draw:
        """The sample at a position (0..batch_size - 1) of the global batch of a step (0, 1, ...)."""
        rng = np.random.default_rng([self.seed, self.phase, step, position])
        by_turns = self._alternates
        if position < self.walked and not (by_turns and step % 2):
            step = step // 2 if by_turns else step
            passed, index = divmod(step * self.walked + position, len(self.slices))
            case, z = self.slices[_permutation(len(self.slices), self.seed, self.phase, passed)[index]]
            return Draw(int(case), int(z), rng)
        organ = sorted(self.by_organ)[int(rng.integers(len(self.by_organ)))]
        shown = self.by_organ[organ]
        case, z = shown[rng.integers(len(shown))]
        return Draw(int(case), int(z), rng, organ)


@lru_cache(maxsize=4)
def _permutation(count: int, *key: int) -> NDArray[np.int64]:
    """The order of one pass; cached, since every sample of the pass asks for it."""
    return np.random.default_rng(key).permutation(count)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Yields each step's (step, position) pairs of this rank: positions rank, rank + world, ... of the global batch."""

    def __init__(self, steps: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.steps = steps
        self.positions = range(rank, batch_size, world)
        self.start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            yield [(step, position) for position in self.positions]
