"""Time and peak memory of `organseg predict` from .nii.gz to .nii.gz, over the number of organs and of slices.

Usage: python tools/bench/prediction.py [--shape 200 512 512] [--size 128]. The network is protocol S's, untrained, and
the scan is noise: neither changes what is computed. Each row is a process of its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from organseg.anatomy import ORGANS
from organseg.methods import PartialLabelModule
from organseg.networks import UNet
from organseg.runtime.checkpoint_io import save_checkpoint
from organseg.volumes import Normalisation, Preprocessing, WorkingGrid, write_image

NETWORK = {"width": 16, "norm_after": "convolution"}


def make_checkpoint(path: Path, organs: int, size: int) -> None:
    """An untrained network's checkpoint."""
    names = list(ORGANS)[:organs]
    module = PartialLabelModule(names, lambda i, o: UNet(i, o, **NETWORK))
    preprocessing = Preprocessing(WorkingGrid(size), Normalisation((-160.0, 300.0), 0.0, 100.0))
    network = {"class_path": "organseg.networks.UNet", "init_args": NETWORK}
    model = {"class_path": "organseg.methods.PartialLabelModule", "init_args": {"network": network}}
    record = {"model": model, "organs": names, "preprocessing": preprocessing.to_json(), "identity": {}}
    save_checkpoint({"state_dict": module.state_dict(), "organseg": record}, path)


def predict(checkpoint: Path, scan: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak MB of one command, in a process that does nothing else."""
    command = [sys.executable, "-m", "organseg", "predict", "--ckpt_path", str(checkpoint), "--input", str(scan),
               "--out", str(out), "--precision", "bf16-mixed", "--accelerator", "cpu"]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # wait4: this child's own peak; RUSAGE_CHILDREN is the largest of all children so far.
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"predict failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(200, 512, 512))
    parser.add_argument("--size", type=int, default=128, help="slices that the network sees")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    depth, rows, columns = arguments.shape
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for slices in (depth // 2, depth):
            scan = folder / f"scan_{slices}.nii.gz"
            noise = np.random.default_rng(0).integers(-200, 300, (slices, rows, columns), dtype=np.int16)
            write_image(scan, noise, np.diag([-0.8, -0.8, 2.0, 1.0]))
            for organs in (1, 13):
                checkpoint = folder / f"{organs}.ckpt"
                make_checkpoint(checkpoint, organs, arguments.size)
                seconds, megabytes = predict(checkpoint, scan, folder / f"out_{organs}_{slices}")
                print(f"{slices} x {rows} x {columns}, {organs:>2} organs: {seconds:6.1f} s, peak {megabytes:6.0f} MB")


if __name__ == "__main__":
    main()
