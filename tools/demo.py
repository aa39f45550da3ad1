"""The whole path on a synthetic cohort: phantoms, check, prepare, fit, test, predict, report; naive against INERRANT0.

Each step is the command that a user would type. What is finished is skipped, so that the script can be run again after
an interruption. Usage: python tools/demo.py --out demo
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "experiment"
METHODS = {"naive": "unlabelled = background", "inerrant0": "ambiguity maps"}


def organseg(*arguments: object) -> None:
    """Run one command, shown as it is typed."""
    words = [str(argument) for argument in arguments]
    print("\n$ organseg " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "organseg", *words], check=True)


def mean_dsc(summary: Path) -> dict[str, float]:
    """Organ -> mean DSC, from a test's summary.csv."""
    with summary.open() as file:
        return {row["organ"]: float(row["dsc_mean"]) for row in csv.DictReader(file)}


def main() -> None:
    """Make the cohort, train both methods, show the table and where the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 96, 96))
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of each method")
    arguments = parser.parse_args()
    start, out = time.monotonic(), arguments.out
    dataset, cache = out / "phantoms" / "dataset.yaml", out / "cache"
    if not dataset.exists():
        organseg("phantom", "--cases", arguments.cases, "--shape", *arguments.shape, "--out", out / "phantoms")
    organseg("check", dataset)
    organseg("prepare", dataset, "--out", cache)
    for method in METHODS:
        run = out / "runs" / f"phantom_30_{method}"
        last = run / "checkpoints" / "last.ckpt"
        config = CONFIGS / f"phantom_30_{method}.yaml"
        steps = ("--trainer.max_steps", arguments.steps)
        organseg("fit", "--config", config, "--data.init_args.cache", cache, "--out", run, *steps)
        organseg("test", "--config", run / "config.yaml", "--ckpt_path", last)
        organseg("report", run)
    scan = next((out / "phantoms" / "img").glob("*.nii.gz"))
    organseg("predict", "--ckpt_path", last, "--input", scan, "--out", out / "predictions")
    scores = {method: mean_dsc(out / "runs" / f"phantom_30_{method}" / "test" / "summary.csv") for method in METHODS}
    print("\nDSC % on held-out phantom patients; each organ labelled in 30% of the training cases")
    print(f"{'organ':<16}" + "".join(f"{method:>12}" for method in METHODS))
    for organ in scores["inerrant0"]:
        print(f"{organ:<16}" + "".join(f"{100 * scores[method][organ]:>12.1f}" for method in METHODS))
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes. Look at:")
    for method, meaning in METHODS.items():
        print(f"  {out / 'runs' / f'phantom_30_{method}' / 'report' / 'index.html'}   ({method}: {meaning})")


if __name__ == "__main__":
    main()
