"""The whole path on a synthetic cohort, from phantoms to predictions and a report; naive, INERRANT0 and INERRANT.

Each step is the command that a user would type. What is finished is skipped, so that the script can be run again after
an interruption. It shows what the methods do, and is no comparison: INERRANT trains a third longer than the others.
Usage: python tools/demo.py --out demo
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
CONFIGS = TOOLS.parent / "configs" / "experiment"
METHODS = {
    "naive": "unlabelled = background",
    "inerrant0": "ambiguity maps",
    "inerrant": "goes on from it with relabelled cases",
}


def organseg(*arguments: object) -> None:
    """Run one command, shown as it is typed."""
    words = [str(argument) for argument in arguments]
    print("\n$ organseg " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "organseg", *words], check=True)


def options_of(method: str, steps: int, runs: Path) -> list[object]:
    """What makes minutes of an experiment: few labels, steps and slices, and one round from INERRANT0's network on."""
    options = ["--data.init_args.label_share", 0.1, "--data.init_args.batch_size", 8, "--trainer.max_steps", steps]
    if method != "inerrant":
        return options
    return [*options, "--curriculum.round0", runs / "inerrant0", "--curriculum.start", "initial",
            "--curriculum.round_steps", steps // 3]  # fmt: skip


def main() -> None:
    """Make the cohort, train the methods, show the table and where the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--shape", type=int, nargs=3, default=(48, 64, 64))
    parser.add_argument(
        "--steps", type=int, default=600, help="optimiser steps of naive and INERRANT0; INERRANT has a third more"
    )
    arguments = parser.parse_args()
    start, out = time.monotonic(), arguments.out
    dataset, cache = out / "phantoms" / "dataset.yaml", out / "cache"
    if not dataset.exists():
        organseg("phantom", "--cases", arguments.cases, "--shape", *arguments.shape, "--out", out / "phantoms")
    organseg("check", dataset)
    organseg("prepare", dataset, "--out", cache)
    for method in METHODS:
        run = out / "runs" / method
        last = run / "checkpoints" / "last.ckpt"
        config = CONFIGS / f"phantom_30_{method}.yaml"
        options = options_of(method, arguments.steps, out / "runs")
        organseg("fit", "--config", config, "--data.init_args.cache", cache, "--out", run, *options)
        organseg("test", "--config", run / "config.yaml", "--ckpt_path", last)
        organseg("report", run)
    if not (out / "new" / "dataset.yaml").exists():
        organseg("phantom", "--cases", 1, "--seed", 1, "--shape", *arguments.shape, "--out", out / "new")
    organseg("predict", "--ckpt_path", last, "--input", out / "new" / "img", "--out", out / "predictions")
    print(
        "\nHeld-out phantom patients; each organ is labelled in 10% of the training cases. Naive and INERRANT0: "
        f"{arguments.steps} steps; INERRANT: INERRANT0's and {arguments.steps // 3} with relabelled cases.",
        flush=True,
    )
    subprocess.run([sys.executable, TOOLS / "table.py", *(out / "runs" / method for method in METHODS)], check=True)
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes. Look at:")
    for method, meaning in METHODS.items():
        print(f"  {out / 'runs' / method / 'report' / 'index.html'}   ({method}: {meaning})")


if __name__ == "__main__":
    main()
