"""The whole path on a synthetic cohort: phantoms, check, prepare, fit, test, predict, report; naive against INERRANT0.

Each step is the command that a user would type. What is finished is skipped, so that the script can be run again after
an interruption. Usage: python tools/demo.py --out demo
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
CONFIGS = TOOLS.parent / "configs" / "experiment"
METHODS = {"naive": "unlabelled = background", "inerrant0": "ambiguity maps"}


def organseg(*arguments: object) -> None:
    """Run one command, shown as it is typed."""
    words = [str(argument) for argument in arguments]
    print("\n$ organseg " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "organseg", *words], check=True)


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
    if not (out / "new" / "dataset.yaml").exists():
        organseg("phantom", "--cases", 1, "--seed", 1, "--shape", *arguments.shape, "--out", out / "new")
    organseg("predict", "--ckpt_path", last, "--input", out / "new" / "img", "--out", out / "predictions")
    print("\nHeld-out phantom patients; each organ is labelled in 30% of the training cases.", flush=True)
    runs = [out / "runs" / f"phantom_30_{method}" for method in METHODS]
    subprocess.run([sys.executable, TOOLS / "table.py", *runs], check=True)
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes. Look at:")
    for method, meaning in METHODS.items():
        print(f"  {out / 'runs' / f'phantom_30_{method}' / 'report' / 'index.html'}   ({method}: {meaning})")


if __name__ == "__main__":
    main()
