"""A curriculum of seconds, what it leaves behind, and ways to kill it (FAULTS.md 5, 6)."""

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401 - the filter of the files
import torch
from toy import TOY
from warm import end_of, signal_group, start

CONFIGS = Path(__file__).parents[1] / "configs"
PHASES = ["00_round0_train", "01_round1_confidence", "02_round1_relabel", "03_round1_train", "04_round2_confidence",
          "05_round2_relabel", "06_round2_train"]  # fmt: skip
TWO_RANKS = ("--trainer.devices=2", "--trainer.strategy=ddp")


def command(toy: Path, run: Path, *more: object) -> list[str]:
    """Two rounds with a checkpoint after every step."""
    words = ["fit", "--config", CONFIGS / "experiment" / "phantom_30_inerrant_thesis.yaml", "--data.init_args.cache",
             toy / "cache", "--out", run, *TOY, "--trainer.max_steps=50", "--checkpoint_every_s=0",
             "--curriculum.rounds=2", "--curriculum.round_steps=5", "--curriculum.score.init_args.steps=5",
             "--curriculum.score.init_args.hidden=[8]", *more]  # fmt: skip
    return [str(word) for word in words]


def weights(path: Path) -> str:
    state = torch.load(path, weights_only=True)["state_dict"]
    return hashlib.sha256(
        b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in state.items())
    ).hexdigest()


def pseudo_labels(run: Path) -> dict[str, str]:
    """Of every file the arrays' bytes, without what it says of its making."""
    found = {}
    for path in sorted(run.glob("pseudo_labels/*/*/*.h5")):
        with h5py.File(path) as file:
            arrays = b"".join(file[name][()].tobytes() for name in sorted(file))
        found[str(path.relative_to(run))] = hashlib.sha256(arrays).hexdigest()
    return found


def results(run: Path) -> dict[str, str]:
    """Weights of every phase and of the result, and pseudo-labels."""
    return {str(path.relative_to(run)): weights(path) for path in sorted(run.rglob("last.ckpt"))} | pseudo_labels(run)


def journal(run: Path) -> list[str]:
    lines = (run / "journal.jsonl").read_text().splitlines() if (run / "journal.jsonl").exists() else []
    return [json.loads(line)["phase"] for line in lines if line]


def losses(run: Path) -> list[str]:
    return [line for line in (run / "metrics.csv").read_text().splitlines() if ",pace/" not in line]


def stop_when(words: list[str], condition: Callable[[], bool], with_signal: int) -> int:
    """Start the command, signal its group once the condition holds; returns the exit code."""
    process = start(words)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            signal_group(process, with_signal)
            break
        time.sleep(0.01)
    return end_of(process, 60)


def killed_at(words: list[str], run: Path, write: str, later: int = 0) -> bool:
    """Run the command with `killed_at/sitecustomize.py`, which ends its group before a write into the run folder.

    Args:
        words: The command.
        run: Its run folder.
        write: Regular expression of the write, `<event> <path below the run folder>`.
        later: Kill not before it, but before the write that comes so many writes after it.

    Returns:
        Whether it came to that; if not, the command has ended with 0.
    """
    place = str(Path(__file__).parent / "killed_at")
    process = start(words, {"PYTHONPATH": place, "KILL_IN": str(run), "KILL_AT": write, "KILL_LATER": str(later)})
    code = end_of(process, 300)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def killed_after(words: list[str], run: Path, delay_s: float) -> bool:
    """Run the command and kill its group so long after it first changed the run folder.

    Returns:
        Whether it came to that; if not, the command has ended with 0.
    """
    before = _stamp(run)
    process = start(words)
    while process.poll() is None and _stamp(run) == before:
        time.sleep(0.01)
    try:
        process.wait(timeout=delay_s)
    except subprocess.TimeoutExpired:
        signal_group(process, signal.SIGKILL)
    code = end_of(process, 60)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def _stamp(run: Path) -> int:
    """When a file in the folder or below last changed or took its name."""
    return max((path.stat().st_mtime_ns for path in [run, *run.glob("**/")] if path.is_dir()), default=0)
