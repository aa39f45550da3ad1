"""Time and peak memory of relabelling one case, against plain prediction of the same case with the same network.

Usage: python tools/bench/relabelling.py [--shape 96 128 128] [--organs 7] [--share 0.1]. The network is protocol S's,
untrained, and the scan is noise: neither changes what is computed. Its last bias is set so that `share` of the voxels
become candidates, which is what decides the memory; the organs of an abdominal scan fill less than a tenth of it.
Memory may grow with the volume (the file has five arrays of it, 11 bytes a voxel) and with the candidates, not with
organs times volume. Each row is a process of its own: CPU seconds, which other work on the machine hardly changes, and
the peak above that of a process that only makes the case.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from organseg.anatomy import ORGANS
from organseg.batch import WholeCase
from organseg.cli.training import quieten
from organseg.curriculum.relabel import Relabelling, Round
from organseg.curriculum.scores import LearnedConfidence, MaximumClassProbability, Score
from organseg.curriculum.selection import Selection
from organseg.data.pseudo_labels import read_round_header
from organseg.methods import PartialLabelModule
from organseg.networks import UNet
from organseg.runtime.precision import affordable_precision
from organseg.volumes import Normalisation

WORK = {
    "nothing": "the case alone",
    "predict": "prediction",
    "mcp": "relabelling, score mcp",
    "smooth": "  smoothed, largest piece",
    "confidence": "relabelling, score confidence",
}


def make_case(shape: tuple[int, int, int], organs: int) -> WholeCase:
    """Noise on the working grid, of which nothing is annotated."""
    image = np.random.default_rng(0).integers(-200, 300, shape, dtype=np.int16)
    normalise = Normalisation((-160.0, 300.0), 0.0, 100.0)
    truth, annotated = np.zeros(shape, np.uint8), np.zeros(organs, bool)
    return WholeCase("bench/case", 0, image, normalise, shape, (2.0, 0.8, 0.8), np.eye(4), truth, annotated)


def make_module(case: WholeCase, organs: int, share: float) -> PartialLabelModule:
    """An untrained network for which that share of a slice's voxels has an organ with a probability of at least 0.5."""
    torch.manual_seed(0)
    module = PartialLabelModule(list(ORGANS)[:organs], lambda i, o: UNet(i, o, width=16, norm_after="convolution"))
    module.eval()
    image = torch.from_numpy(case.normalise(case.image[len(case.image) // 2])[None, None])
    with torch.inference_mode():
        best = module.network(image).amax(dim=1).flatten().sort().values
    with torch.no_grad():
        module.network.head.bias -= best[min(int((1 - share) * len(best)), len(best) - 1)]
    return module


def work(kind: str, shape: tuple[int, int, int], organs: int, share: float, folder: Path) -> None:
    """What a child does; prints its CPU seconds and its candidates."""
    quieten()
    case = make_case(shape, organs)
    network = make_module(case, organs, share)
    module: L.LightningModule = network
    scores: dict[str, Score] = {
        "mcp": MaximumClassProbability(),
        "smooth": MaximumClassProbability(),
        "confidence": LearnedConfidence(hidden=(100, 30, 16, 16)),
    }
    if kind in scores:
        learner = scores[kind].learner(network, lambda: network, {})
        selection = Selection(smooth_mm=3.0, largest_piece=True) if kind == "smooth" else Selection()
        task = Round(1, 0.5, folder, "bench", None, selection, (float("nan"),) * organs, {case.key})
        module = Relabelling(network, learner, scores[kind].scorer(network, learner), task)
    precision = affordable_precision("bf16-mixed", "cpu")
    trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    loader = DataLoader([case] if kind != "nothing" else [None], batch_size=None)
    start = time.process_time()
    trainer.predict(module, loader, return_predictions=False)
    seconds = time.process_time() - start
    print(seconds, sum(read_round_header(folder, case.key).candidates) if kind in scores else 0)


def measure(kind: str, arguments: argparse.Namespace) -> tuple[float, int, float]:
    """CPU seconds, candidates and peak MB of one kind, in a process that does nothing else."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--kind", kind, "--out", name, "--organs", arguments.organs,
                   "--share", arguments.share, "--shape", *arguments.shape]  # fmt: skip
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        text = process.stdout.read()
        # wait4: this child's own peak; RUSAGE_CHILDREN is the largest of all children so far.
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{kind} failed: {' '.join(map(str, command))}")
    seconds, candidates = text.split()
    return float(seconds), int(candidates), usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(96, 128, 128))
    parser.add_argument("--organs", type=int, default=7)
    parser.add_argument("--share", type=float, default=0.1, help="of the voxels that become candidates")
    parser.add_argument("--kind", choices=tuple(WORK), help=argparse.SUPPRESS)  # in a child
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        return work(arguments.kind, tuple(arguments.shape), arguments.organs, arguments.share, arguments.out)
    voxels = float(np.prod(arguments.shape))
    rows = {kind: measure(kind, arguments) for kind in WORK}
    _, _, base = rows.pop("nothing")
    shape = " x ".join(map(str, arguments.shape))
    print(f"{shape}, {arguments.organs} organs; the process with the case alone: {base:.0f} MB")
    for kind, (seconds, candidates, peak) in rows.items():
        each, more = (peak - base) * 2**20 / voxels, peak - base
        print(
            f"{WORK[kind]:<32}{seconds:>8.1f} CPU s{seconds / rows['predict'][0]:>7.2f} x{more:>8.0f} MB more"
            f"{each:>8.1f} bytes a voxel{candidates / voxels:>8.1%} candidates"
        )


if __name__ == "__main__":
    main()
