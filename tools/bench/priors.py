"""Priors: aligning by FFT against scanning all translations, and what the prior adds to a training step.

Usage: python tools/bench/priors.py [--shift 16] [--steps 5]. Prints the time of a scan of all translations (timed on
some of them) as a ratio to that of `align`, on a pancreas's box, and of a training step of protocol S with the prior in
the activation as a ratio to the plain one.
"""

import argparse
import time
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from organseg.losses import partial_label_loss
from organseg.networks import UNet
from organseg.priors import Prior, align, place, prior_logits
from organseg.runtime.precision import bf16_in_hardware

BOX = (40, 60, 90)
SCANNED = 200


def scanned(probs: NDArray[np.float32], reference: NDArray[np.bool_], shifts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The translation with the lowest divergence, one after another, with nothing computed twice."""
    clamped = np.clip(probs, 1e-6, 1 - 1e-6)
    most = max(abs(step) for shift in shifts for step in shift)
    inside, outside = (np.pad(np.log(part), most, constant_values=np.log(eps)) for part, eps in
                       ((clamped, 1e-6), (1 - clamped, 1 - 1e-6)))  # fmt: skip
    scores = {}
    for shift in shifts:
        there = tuple(slice(most - step, most - step + n) for step, n in zip(shift, probs.shape, strict=True))
        scores[shift] = float(np.where(reference, inside[there], outside[there]).sum())
    return max(scores, key=lambda shift: scores[shift])


def aligning(most: int) -> None:
    """FFT against scan."""
    rng = np.random.default_rng(0)
    shape = tuple(n + 2 * most for n in BOX)
    grid = np.stack(np.meshgrid(*(np.linspace(-n / m, n / m, n) for n, m in zip(shape, BOX, strict=True)),
                                indexing="ij"))  # fmt: skip
    reference = (grid**2).sum(axis=0) < 1
    probs = np.roll(np.where(reference, 0.9, 0.05), (3, -5, 7), (0, 1, 2)) + rng.uniform(0, 0.05, shape)
    probs = probs.astype(np.float32)
    start = time.perf_counter()
    found = align(probs, reference, most)
    by_fft = time.perf_counter() - start
    assert found == (-3, 5, -7)
    shifts = list(product(range(-most, most + 1), repeat=3))
    some = [shifts[index] for index in rng.choice(len(shifts), min(SCANNED, len(shifts)), replace=False)]
    start = time.perf_counter()
    scanned(probs, reference, [*some, found])
    by_scan = (time.perf_counter() - start) * len(shifts) / (len(some) + 1)
    print(f"{'align, ' + ' x '.join(map(str, shape)) + f', +-{most} voxels':<48}{by_fft:8.2f} s   "
          f"scan of {len(shifts)} translations {by_scan:8.1f} s   {by_scan / by_fft:6.0f} x")  # fmt: skip


def step_seconds(prior: bool, steps: int) -> float:
    """A training step of protocol S, seven organs."""
    torch.manual_seed(0)
    network = UNet(1, 7, width=16, norm_after="convolution").to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    image = torch.randn(16, 1, 128, 128).contiguous(memory_format=torch.channels_last)
    label = torch.randint(0, 8, (16, 128, 128), dtype=torch.uint8)
    annotated = torch.ones(16, 7, dtype=torch.bool)
    known = [Prior("liver", np.random.rand(5, 100, 130).astype(np.float32), (150.0, 200, 260), (3.0, 2, 2), 5, ())] * 7
    to_mm = torch.diag(torch.tensor([3.0, 2.8, 2.8, 1])).repeat(16, 1, 1)
    centre = torch.full((16, 7, 3), 150.0)
    for step in range(steps + 2):
        if step == 2:
            start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16_in_hardware()):
            logits = network(image)
        if prior:
            logits = prior_logits(logits, place(known, to_mm, centre, (128, 128), 1e-3))
        optimizer.zero_grad()
        partial_label_loss(logits, label, annotated).backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shift", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    aligning(arguments.shift)
    plain, with_prior = (step_seconds(prior, arguments.steps) for prior in (False, True))
    print(f"{'training step, 16 slices of 128 x 128':<48}{1000 * with_prior:8.0f} ms  "
          f"without a prior {1000 * plain:8.0f} ms   {with_prior / plain:6.2f} x")  # fmt: skip


if __name__ == "__main__":
    main()
