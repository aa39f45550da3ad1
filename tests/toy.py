"""The real command in a process of its own, at toy size."""

import subprocess
from pathlib import Path

import warm

TOY = (
    "--data.init_args.batch_size=4",
    "--data.init_args.workers=0",
    "--model.init_args.network.init_args.width=4",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
)
"""What turns a shipped config into one of seconds."""


def organseg(
    *arguments: object, check: int | None = 0, cwd: Path | None = None, cold: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the real command; `check` is the exit code that it must have, `cold` starts an interpreter for it."""
    done = warm.run([str(argument) for argument in arguments], cwd, cold=cold)
    assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
