"""The real command in a process of its own, at toy size."""

import os
import subprocess
import sys
from pathlib import Path

TOY = (
    "--data.init_args.batch_size=4",
    "--data.init_args.workers=0",
    "--model.init_args.network.init_args.width=4",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
)
"""What turns a shipped config into one of seconds."""


def organseg(*arguments: object, check: int | None = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real command; `check` is the exit code that it must have."""
    words = [sys.executable, "-m", "organseg", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
