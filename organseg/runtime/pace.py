"""How fast training is and how long it waits for data: in the progress bar, the metrics, or plain lines in a log."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class Pace(Callback):
    """Logs `pace/samples_per_s`, `pace/data_wait` (share of the time spent waiting for batches) and `pace/lr`.

    Where no terminal shows the progress bar, it prints a line every `print_every_s` seconds instead.
    """

    def __init__(self, every_steps: int = 50, print_every_s: float = 30.0) -> None:
        self.every_steps = every_steps
        self.print_every_s = print_every_s
        self.printed_at = self.window_start = self.step_end = time.monotonic()
        self.waited, self.samples, self.steps = 0.0, 0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks."""
        self.printed_at = self.window_start = self.step_end = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """What passed since the last step was waiting."""
        self.waited += time.monotonic() - self.step_end
        self.samples += len(batch["image"]) * trainer.world_size
        self.steps += 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the end of each window."""
        now = time.monotonic()
        if self.steps >= self.every_steps or now - self.window_start > self.print_every_s:
            elapsed = max(now - self.window_start, 1e-9)
            wait, speed = self.waited / elapsed, self.samples / elapsed
            rate = float(trainer.optimizers[0].param_groups[0]["lr"])
            pl_module.log("pace/lr", rate, rank_zero_only=True, batch_size=1)
            pl_module.log("pace/data_wait", wait, prog_bar=True, rank_zero_only=True, batch_size=1)
            pl_module.log("pace/samples_per_s", speed, prog_bar=True, rank_zero_only=True, batch_size=1)
            if now - self.printed_at > self.print_every_s and trainer.is_global_zero and not sys.stdout.isatty():
                left = (trainer.num_training_batches - batch_idx - 1) * elapsed / self.steps
                named = {name: value for name, value in trainer.callback_metrics.items() if name.endswith("/loss")}
                loss = float(next(iter(named.values()), float("nan")))
                kind = "slices" if batch["image"].ndim == 4 else "patches"
                print(
                    f"step {batch_idx + 1}/{trainer.num_training_batches}  loss {loss:.3f}  {speed:.1f} {kind}/s  "
                    f"waiting for data {wait:.0%}  {left / 60:.1f} min left",
                    flush=True,
                )
                self.printed_at = now
            self.waited, self.samples, self.steps, self.window_start = 0.0, 0, 0, now
        self.step_end = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is neither waiting nor training."""
        self.on_train_start(trainer, pl_module)
        self.waited, self.samples, self.steps = 0.0, 0, 0
