"""Witnesses of what each rank does, for tests: a command names them after `--trust-import watched`.

They write into the folder of the environment variable WATCH, each rank its own files, so that a test reads with its own
eyes what ranks hold, and does not take the product's word for it.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from organseg.batch import View
from organseg.curriculum import Curriculum
from organseg.curriculum.scores import ConfidenceModule, LearnedConfidence, MaximumClassProbability, Scorer
from organseg.errors import IntegrityError
from organseg.processes import STOP


def folder() -> Path:
    return Path(os.environ["WATCH"])


def keep(trainer: L.Trainer, module: L.LightningModule, moment: str) -> None:
    """What this rank holds now, as `<phase>-<moment>-<rank>.pt`."""
    curriculum = next(callback for callback in trainer.callbacks if isinstance(callback, Curriculum))
    torch.save(module.state_dict(), folder() / f"{curriculum.phase.name}-{moment}-{trainer.global_rank}.pt")


class Witness(Callback):
    """Of segmentation trainings: after the last step, and after each validation."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keep(trainer, pl_module, "trained")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keep(trainer, pl_module, "validated")


class SlowValidation(Callback):
    """Each case takes as long as a large one."""

    def on_validation_batch_start(self, *_: Any) -> None:
        time.sleep(3)


class Astray(Callback):
    """Rank 1 goes on from another checkpoint than the others."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.global_rank == 1:
            next(
                callback for callback in trainer.callbacks if isinstance(callback, Curriculum)
            ).resume_digest = "another"


class Diverge(Callback):
    """Rank 1 takes another way after its third step."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            with torch.no_grad():
                next(pl_module.parameters()).view(-1)[0].add_(1e-3)


class FailAlone(Callback):
    """Rank 1 meets an error that the others do not."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            raise IntegrityError("a fault of this rank alone")


class WatchedModule(ConfidenceModule):
    def on_train_end(self) -> None:
        keep(self.trainer, self, "trained")


class WatchedConfidence(LearnedConfidence):
    """Keeps what each rank's confidence network is after its last step."""

    def learner(self, method: Any, *_: Any) -> WatchedModule:
        return WatchedModule(method, self)


class PlainModule(WatchedModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=1.0)


class PlainConfidence(LearnedConfidence):
    """Trained by plain SGD: Adam turns the rounding of a tiny gradient into a whole step."""

    def learner(self, method: Any, *_: Any) -> PlainModule:
        return PlainModule(method, self)


class WatchedProbability(MaximumClassProbability):
    """Notes each slab of slices that a rank relabels, one line of `slabs-<rank>.txt`."""

    def scorer(self, method: Any, learner: L.LightningModule | None) -> Scorer:
        score: Scorer = super().scorer(method, learner)

        def watched(view: View) -> Tensor:
            with (folder() / f"slabs-{method.trainer.global_rank}.txt").open("a") as file:
                file.write(hashlib.sha256(view["image"].cpu().numpy().tobytes()).hexdigest() + "\n")
            return score(view)

        return watched


class SlowProbability(MaximumClassProbability):
    """A case that takes until a signal comes; `viewed` says that its first view has begun."""

    def scorer(self, method: Any, learner: L.LightningModule | None) -> Scorer:
        score: Scorer = super().scorer(method, learner)

        def slow(view: View) -> Tensor:
            (folder() / "viewed").touch()
            deadline = time.monotonic() + 100
            while not STOP.asked and time.monotonic() < deadline:
                time.sleep(0.05)
            return score(view)

        return slow
