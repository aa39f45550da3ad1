"""Relabelling: which voxels that nobody annotated get a pseudo-label, and of which organ (METHOD.md 1.5).

Candidates are found slab by slab and kept as index, organ, score and probability; a case's file is made of five
volumes (11 bytes a voxel), whatever the number of organs. It is written at once; what is there is not made again.
"""

import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from organseg.batch import Segmenter, View, WholeCase
from organseg.curriculum.scores import Scorer
from organseg.curriculum.selection import Selection, choose
from organseg.data.pseudo_labels import (
    PseudoLabels,
    RoundHeader,
    exists,
    merge,
    read_pseudo_labels,
    write_pseudo_labels,
)
from organseg.errors import IntegrityError, Interrupted
from organseg.processes import STOP

_PROVENANCE = ("label", "round", "score", "probability")
"""Of a pseudo-label that an earlier round added: it stays as that round wrote it."""


@dataclass(frozen=True)
class Round:
    """What one round's relabelling is to do.

    Attributes:
        index: From 1.
        gamma: Share of each organ's candidates to add.
        folder: Where the files go.
        made_by: Digest of all that they follow from.
        before: Folder of the round whose additions stay; None where pseudo-labels are replaced.
        selection: What may become a pseudo-label.
        mean_ml: Mean volume of each organ in the cases that annotate it; NaN where none does.
        training: Keys of the training cases; no other is relabelled.
    """

    index: int
    gamma: float
    folder: Path
    made_by: str
    before: Path | None
    selection: Selection
    mean_ml: tuple[float, ...]
    training: Collection[str]


class Candidates:
    """Collects a case's candidates as its slabs complete.

    Args:
        label: [Z, Y, X] what is annotated or was added before: candidates are where it is 0.
        unknown: [K] organs that the case does not annotate.
        spacing: mm (z, y, x).
        threshold: A candidate's probability is at least this.
    """

    def __init__(
        self,
        label: NDArray[np.uint8],
        unknown: NDArray[np.bool_],
        spacing: tuple[float, float, float],
        threshold: float,
    ) -> None:
        self.label = label
        self.spacing = spacing
        self.threshold = threshold
        self.channels = torch.from_numpy(np.flatnonzero(unknown))
        self.organs = len(unknown)
        self._found: list[list[NDArray[Any]]] = []

    def best(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable unannotated organ of each voxel: probability and place in `channels`, [b, *S] each."""
        probability, place = both[:, self.channels].max(dim=1)
        return probability, place

    def add(self, start: int, both: Tensor) -> None:
        """Probabilities and scores [b, 2K, Y, X] of the slices from `start` on."""
        self.channels = self.channels.to(both.device)
        probability, place = self.best(both)
        free = torch.from_numpy(self.label[start : start + len(both)] == 0).to(both.device)
        voxels = torch.nonzero((probability >= self.threshold) & free, as_tuple=True)
        channel = self.channels[place[voxels]]
        score = both[voxels[0], self.organs + channel, voxels[1], voxels[2]]
        plane = self.label.shape[1] * self.label.shape[2]
        index = (voxels[0] + start) * plane + voxels[1] * self.label.shape[2] + voxels[2]
        # What is found leaves the device, and no volume of probabilities.
        self._found.append([tensor.cpu().numpy() for tensor in (index, channel + 1, score, probability[voxels])])

    def collected(self) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
        """Flat index (rising), organ (channel + 1), score and probability of all candidates."""
        index, organ, score, probability = (np.concatenate(part) for part in zip(*self._found, strict=True))
        return index, organ.astype(np.uint8), score.astype(np.float32), probability.astype(np.float32)


class Relabelling(L.LightningModule):
    """Run by `trainer.predict` over the cases that lack an organ; ranks share the cases.

    Args:
        method: The trained segmentation.
        learner: What the score needs, if it was trained; moved to the device with the method.
        scorer: Gives probabilities and scores.
        task: What to do.
    """

    def __init__(self, method: Segmenter, learner: nn.Module | None, scorer: Scorer, task: Round) -> None:
        super().__init__()
        self.method = method
        self.learner = learner
        self.scorer = scorer
        self.task = task

    def predict_step(self, case: WholeCase | None, batch_idx: int) -> None:
        """Publish one case's pseudo-labels, unless they are there; None is a turn without a case.

        Raises:
            IntegrityError: If the case must not be relabelled.
        """
        if case is None:
            return
        task = self.task
        if case.key not in task.training or case.annotated.all():
            raise IntegrityError(
                f"{case.key}: found among the cases to relabel, expected training cases that lack an organ; the data "
                "module must give no others"
            )
        if exists(task.folder, case.key, task.made_by):
            return
        assert case.truth is not None
        # Of the round before, the label alone is held while the network runs.
        label = merge(case.truth, read_pseudo_labels(task.before, case.key).label) if task.before else case.truth
        candidates = Candidates(label, ~case.annotated, case.spacing, task.selection.threshold)
        try:
            self.method.sweep(case, self._outputs, _nothing, candidates.add)
        except Interrupted:
            return  # the ranks stop together, after this turn
        before = read_pseudo_labels(task.before, case.key) if task.before else None
        voxels, header = select(candidates, before, task, case.key, self.method.organs)
        write_pseudo_labels(task.folder, header, voxels)

    def _outputs(self, view: View) -> Tensor:
        """Probabilities and scores, unless a signal asks to stop: a case may take longer than whoever asked waits.

        With several ranks, those that got no signal finish their case first.
        """
        if STOP.asked:
            raise Interrupted
        return self.scorer(view)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Whole cases stay where they are: their slabs travel."""
        return batch


def _nothing(both: Tensor) -> Tensor:
    return torch.zeros(len(both), *both.shape[2:], dtype=torch.uint8)


def select(
    candidates: Candidates, before: PseudoLabels | None, task: Round, key: str, organs: Sequence[str]
) -> tuple[PseudoLabels, RoundHeader]:
    """Choose among a case's candidates, organ by organ."""
    index, organ, score, probability = candidates.collected()
    shape = candidates.label.shape

    def volume(values: NDArray[Any]) -> NDArray[Any]:
        flat = np.zeros(candidates.label.size, dtype=values.dtype)
        flat[index] = values
        return flat.reshape(shape)

    chosen = np.zeros(len(index), dtype=bool)
    found, added = [0] * len(organs), [0] * len(organs)
    for channel in range(len(organs)):
        ours = np.flatnonzero(organ == channel + 1)
        picked, score[ours], probability[ours] = choose(
            index[ours], score[ours], probability[ours], shape, candidates.spacing, task.gamma, task.selection,
            task.mean_ml[channel],
        )  # fmt: skip
        chosen[ours] = picked
        found[channel], added[channel] = len(ours), int(picked.sum())
    voxels = PseudoLabels(
        volume(np.where(chosen, organ, 0).astype(np.uint8)),
        volume(np.where(chosen, task.index, 0).astype(np.uint8)),
        volume(organ),
        volume(score),
        volume(probability),
    )
    if before is not None:
        stays = before.round > 0
        kept = {name: np.where(stays, getattr(before, name), getattr(voxels, name)) for name in _PROVENANCE}
        voxels = replace(voxels, **kept)
    header = RoundHeader(key, tuple(organs), task.index, task.gamma, task.made_by, tuple(found), tuple(added))
    return voxels, header


def stop_if_asked(trainer: L.Trainer) -> None:
    """Turn a signal to any rank into `Interrupted` on all of them; ranks wait for each other here.

    Raises:
        Interrupted: If there was one.
    """
    if trainer.strategy.reduce_boolean_decision(STOP.asked, all=False):
        raise Interrupted(
            "stopped by a signal while relabelling; the same command goes on with the cases that are left"
        )


class Turns(L.Callback):
    """After each turn ranks agree whether to stop; where no terminal shows the progress, a line now and then says it.

    Args:
        cases: To relabel, on all ranks.
        print_every_s: Seconds between two lines.
    """

    def __init__(self, cases: int, print_every_s: float = 30.0) -> None:
        self.cases = cases
        self.print_every_s = print_every_s
        self.printed_at = time.monotonic()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals, and start the clock."""
        STOP.listen()
        self.printed_at = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Agree, then print if it is time."""
        stop_if_asked(trainer)
        now = time.monotonic()
        if now - self.printed_at > self.print_every_s and trainer.is_global_zero and not sys.stdout.isatty():
            done = min((batch_idx + 1) * trainer.world_size, self.cases)
            print(f"relabelled {done} of {self.cases} cases", flush=True)
            self.printed_at = now
