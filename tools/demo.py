"""The whole path on a synthetic cohort, from phantoms to predictions and a report; naive, INERRANT0 and INERRANT.

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
METHODS = {
    "naive": "unlabelled = background",
    "inerrant0": "ambiguity maps",
    "inerrant": "ambiguity maps, then two rounds of relabelling",
}


def organseg(*arguments: object) -> None:
    """Run one command, shown as it is typed."""
    words = [str(argument) for argument in arguments]
    print("\n$ organseg " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "organseg", *words], check=True)


def steps_of(method: str, steps: int) -> list[object]:
    """The options that give a method its optimiser steps; two rounds take a third of them."""
    if method != "inerrant":
        return ["--trainer.max_steps", steps]
    rest = steps // 6
    return ["--trainer.max_steps", steps - 2 * rest, "--curriculum.round_steps", rest,
            "--curriculum.score.init_args.steps", rest]  # fmt: skip


def main() -> None:
    """Make the cohort, train the methods, show the table and where the pictures are."""
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
        steps = steps_of(method, arguments.steps)
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
