"""The training loop against the bare step, in one process: what data, augmentation, logging and saving cost.

Usage: python tools/bench/training.py [--size 128] [--batch 16] [--steps 40]. Protocol S's network on a phantom cohort
that is made in a temporary folder. Prints slices/s of the step in fp32, the step in bf16 with channels_last, and the
whole loop.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import torch

from organseg.cli import run
from organseg.losses import partial_label_loss
from organseg.networks import UNet
from organseg.processes import keep_freed_memory
from organseg.runtime.metrics_log import read_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "experiment" / "phantom_30_inerrant0.yaml"


def bare_step(size: int, batch: int, steps: int, fast: bool) -> float:
    """Slices a second of forward, loss, backward and optimiser on one batch that lies in memory."""
    memory_format = torch.channels_last if fast else torch.contiguous_format
    network = UNet(width=16, norm_after="convolution").to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    image = torch.randn(batch, 1, size, size).contiguous(memory_format=memory_format)
    label = torch.randint(0, 8, (batch, size, size), dtype=torch.uint8)
    annotated = torch.ones(batch, 7, dtype=torch.bool)
    for step in range(steps + 3):
        if step == 3:
            start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = network(image)
        optimizer.zero_grad()
        partial_label_loss(logits, label, annotated).backward()
        optimizer.step()
    return batch * steps / (time.perf_counter() - start)


def loop(folder: Path, size: int, batch: int, steps: int, workers: int) -> tuple[float, float]:
    """Slices a second and data-wait share of `organseg fit`, as it logs them."""
    command = ["fit", "--config", str(CONFIG), "--data.init_args.cache", str(folder / "cache"),
               "--out", str(folder / f"run_{workers}"), f"--trainer.max_steps={steps + 60}",
               f"--data.init_args.batch_size={batch}", f"--data.init_args.workers={workers}"]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(command) == 0
    rows = read_metrics(folder / f"run_{workers}" / "metrics.csv")
    last = {name: value for _, name, value in rows}
    return last["pace/samples_per_s"], last["pace/data_wait"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    size, batch, steps = arguments.size, arguments.batch, arguments.steps
    rows = [("bare step, fp32", bare_step(size, batch, steps, fast=False))]
    keep_freed_memory()
    rows.append(("bare step, bf16, channels_last", bare_step(size, batch, steps, fast=True)))
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        shape = ["--shape", "32", str(size), str(size)]
        assert run(["phantom", "--cases", "8", *shape, "--out", str(folder / "phantoms")]) == 0
        assert run(["prepare", str(folder / "phantoms" / "dataset.yaml"), "--out", str(folder / "cache")]) == 0
        for workers in (0, 2):
            speed, wait = loop(folder, size, batch, steps, workers)
            rows.append((f"organseg fit, {workers} workers (waiting for data {wait:.0%})", speed))
    reference = rows[1][1]
    for text, speed in rows:
        print(f"{text:<50}{speed:>8.1f} slices/s{speed / reference:>8.2f} x")


if __name__ == "__main__":
    main()
