"""Time and peak memory of a long scan through the shipped 3D network's windows, over numbers of organs and slices.

Usage: python tools/bench/windows.py [--shape 800 512 512] [--mm 3 3 3] [--organs 1 13]. The network is that of
btcv3d_100_inerrant0, untrained; the scan has voxels of 1 x 0.8 x 0.8 mm and is made up where it is looked at, so that
it takes no memory itself. The network sees it on voxels of `--mm`, and every voxel of it gets a label: that label map,
one byte a voxel, is all that may grow with the number of slices. Each row is a process of its own.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from organseg.anatomy import ORGANS
from organseg.batch import WholeCase
from organseg.cli.configs import load_config
from organseg.cli.modules import build_module
from organseg.cli.training import quieten
from organseg.runtime.precision import affordable_precision
from organseg.volumes import Normalisation, WorkingGrid

EXPERIMENT = Path(__file__).resolve().parents[2] / "configs" / "experiment" / "btcv3d_100_inerrant0.yaml"
SCAN_MM = (1.0, 0.8, 0.8)


class Scan:
    """[Z, Y, X] int16, of which only what is cut out exists."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: tuple[slice, slice, slice]) -> NDArray[np.int16]:
        z, y, x = (np.arange(n)[places] for n, places in zip(self.shape, part, strict=True))
        values: NDArray[np.int16] = ((z[:, None, None] * 73 + y[:, None] * 19 + x * 7) % 500 - 200).astype(np.int16)
        return values


def work(shape: tuple[int, int, int], mm: tuple[float, float, float], organs: int, patch: tuple[int, int, int]) -> None:
    """What a child does; prints the seconds of the prediction."""
    quieten()
    names = list(ORGANS)[:organs]
    module = build_module(load_config(EXPERIMENT)["model"], names)
    scan: Any = Scan(WorkingGrid(None, mm).shape(shape, SCAN_MM))
    normalise = Normalisation((-160.0, 300.0), 0.0, 100.0)
    case = WholeCase("bench/case", 0, scan, normalise, shape, SCAN_MM, np.eye(4), None, np.zeros(organs, bool), patch)
    trainer = L.Trainer(accelerator="cpu", precision=affordable_precision("bf16-mixed", "cpu"), logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    start = time.perf_counter()
    trainer.predict(module, DataLoader([case], batch_size=None), return_predictions=False)
    print(time.perf_counter() - start)


def measure(arguments: argparse.Namespace, slices: int, organs: int) -> tuple[float, float]:
    """Seconds and peak MB of one prediction, in a process that does nothing else."""
    words = [sys.executable, __file__, "--child", "--organs", organs, "--shape", slices, *arguments.shape[1:],
             "--mm", *arguments.mm, "--patch", *arguments.patch]  # fmt: skip
    process = subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    text = process.stdout.read()
    # wait4: this child's own peak; RUSAGE_CHILDREN is the largest of all children so far.
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"prediction failed: {' '.join(map(str, words))}")
    return float(text), usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = load_config(EXPERIMENT)["data"]["init_args"]["patch_size"]
    parser.add_argument("--shape", type=int, nargs=3, default=(800, 512, 512), help="of the scan; a quarter of it, too")
    parser.add_argument("--mm", type=float, nargs=3, default=(3.0, 3.0, 3.0), help="voxels that the network sees")
    parser.add_argument("--organs", type=int, nargs="+", default=[1, 13])
    parser.add_argument("--patch", type=int, nargs=3, default=shipped, help="that the network sees at a time")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape, mm, patch = tuple(arguments.shape), tuple(arguments.mm), tuple(arguments.patch)
    if arguments.child:
        return work(shape, mm, arguments.organs[0], patch)
    grid = " x ".join(map(str, WorkingGrid(None, mm).shape(shape, SCAN_MM)))
    print(f"the network sees {grid} voxels in windows of {' x '.join(map(str, patch))}")
    for organs in arguments.organs:
        for slices in (shape[0] // 4, shape[0]):
            seconds, megabytes = measure(arguments, slices, organs)
            labels = slices * shape[1] * shape[2] / 2**20
            size = f"{slices} x {shape[1]} x {shape[2]}"
            memory = f"peak {megabytes:6.0f} MB: labels {labels:4.0f} MB, all else {megabytes - labels:6.0f} MB"
            print(f"{size}, {organs:>2} organs: {seconds:7.1f} s, {memory}", flush=True)


if __name__ == "__main__":
    main()
