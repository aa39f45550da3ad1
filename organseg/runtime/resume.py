"""Callbacks that make a stopped run go on as if it had not stopped (FAULTS.md 5 and 6).

`LastCheckpoint` saves the whole state every few minutes, at the end, and when a signal asks to stop; `StepSeed` makes
what a step draws depend on the step alone. Between a batch that validation follows and that validation nothing is
saved: resuming there would skip it.
"""

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn

from organseg.errors import Interrupted, NumericsError
from organseg.processes import STOP


class StepSeed(Callback):
    """Seeds torch before each step from (seed, step, rank)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before each batch; `batch_idx` counts on across a resume."""
        drawn = np.random.default_rng([self.seed, 2, batch_idx, trainer.global_rank]).integers(2**62)
        torch.manual_seed(int(drawn))


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, and turns a signal into a checkpoint and `Interrupted` (exit 75).

    Must be the last of the callbacks, so that it saves their new state.

    Args:
        folder: Of the checkpoints.
        every_s: Seconds between two saves.
    """

    def __init__(self, folder: Path, every_s: float = 120.0) -> None:
        self.path = folder / "last.ckpt"
        self.every_s = every_s
        self.saved_at = time.monotonic()
        self.stopped = False

    def state_dict(self) -> dict[str, Any]:
        """Whether the user's callbacks have ended the training early, which Lightning forgets."""
        return {"stopped": self.stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a checkpoint."""
        self.stopped = state_dict["stopped"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was ended stays ended."""
        trainer.should_stop = trainer.should_stop or self.stopped

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals."""
        STOP.listen()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two steps if it is time or a signal came, unless validation comes first."""
        if batch_idx + 1 >= trainer.num_training_batches or _validation_follows(trainer, batch_idx):
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # the gradient that is being accumulated is in no checkpoint
        if trainer.should_stop:
            return  # validation follows here too, and the end
        agree = trainer.strategy.reduce_boolean_decision
        stop = agree(STOP.asked, all=False)
        due = agree(time.monotonic() - self.saved_at > self.every_s, all=False)
        if stop or due:
            # Lightning logs a step after this hook: a stop here, or a kill, would lose the numbers of a step that
            # the checkpoint counts as done.
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer)
        if stop:
            raise Interrupted(f"stopped by a signal; the same command goes on from step {trainer.global_step}")

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stop between two cases: a validation may take longer than whoever asked will wait."""
        if not trainer.sanity_checking and trainer.strategy.reduce_boolean_decision(STOP.asked, all=False):
            raise Interrupted("stopped by a signal while validating; the same command goes on from the last checkpoint")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the result: one epoch is the whole phase."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self.stopped = trainer.should_stop
        trainer.save_checkpoint(self.path, weights_only=False)  # "weights only" would leave out the optimiser
        self.saved_at = time.monotonic()


def _validation_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    every = trainer.val_check_batch
    return bool(trainer.enable_validation and every and every != float("inf") and (batch_idx + 1) % every == 0)


class FiniteLoss(Callback):
    """Leaves out steps without a finite gradient, and stops a diverged run instead of training on NaN to the end.

    A step that is left out changes nothing: no weight, no state of the optimiser, no running mean of a BatchNorm.

    Args:
        patience: Steps in a row without a finite gradient before it stops.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.bad = 0
        self._cases: list[str] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []
        """Buffers of normalisations, and what they held before the step."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what the step will change in the forward pass."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._cases = sorted(set(batch["case"]))
        norms = (module for module in pl_module.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
        self._statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drop a gradient that is not finite, on all ranks alike: it is synchronised already."""
        parameters = [p for p in pl_module.parameters() if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
        if torch.stack(norms).sum().isfinite():
            self.bad = 0
            return
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # else that leaves the step out
            for parameter in parameters:
                parameter.grad = None  # a gradient of zero would still move weights, by momentum and decay
        for buffer, before in self._statistics:
            buffer.copy_(before)
        self.bad += 1
        if self.bad >= self.patience:
            raise NumericsError(
                f"no finite gradient in {self.bad} steps in a row up to step {trainer.global_step}; the last good "
                "checkpoint is kept: lower the learning rate"
            )
        cases = f"{', '.join(self._cases[:3])}{' ...' if len(self._cases) > 3 else ''}"
        print(f"organseg: warning: step {trainer.global_step} has no finite gradient, and is left out (rank "
              f"{trainer.global_rank}: {cases})", file=sys.stderr)  # fmt: skip
