"""The trainings of a comparison: what is wanted is trained and tested, one after another or several at a time."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from organseg.errors import OrgansegError, UsageError


@dataclass(frozen=True)
class Training:
    """A run that is missing.

    Attributes:
        folder: The run's.
        fit: The words after `organseg fit`.
        after: Folder of another that has to be finished before, if that is missing too.
    """

    folder: Path
    fit: Sequence[str]
    after: Path | None = None


class CommandError(OrgansegError):
    """A command failed, and has said why; its exit code is kept (75: interrupted, the same command goes on)."""

    def __init__(self, words: Sequence[str], code: int) -> None:
        super().__init__(f"organseg {' '.join(words)}: ended with exit code {code}")
        self.exit_code = code if code >= 0 else 128 - code


def organseg(*words: str) -> None:
    """Run one command, shown as it is typed.

    Raises:
        CommandError: If it fails.
    """
    print("$ organseg " + " ".join(words), flush=True)
    code = subprocess.run([sys.executable, "-m", "organseg", *words]).returncode
    if code:
        raise CommandError(words, code)


def train(missing: Sequence[Training], minutes: float, jobs: int, check: Callable[[], None]) -> None:
    """Train and test, in this order, while there is time to begin.

    Args:
        missing: What another one comes `after` stands before it.
        minutes: None is begun after them.
        jobs: At a time; more than one for a GPU that one training does not fill.
        check: Called after each command; raises where what there is cannot be compared.

    Raises:
        UsageError: If no training may run at a time.
        CommandError: If a command fails: those that run go on to their end, and no other is begun.
    """
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: expected at least 1")
    end = time.monotonic() + 60 * minutes
    begun: dict[Path, Future[None]] = {}
    failed = Event()

    def work(one: Training) -> None:
        if one.after in begun:
            begun[one.after].result()
        last = one.folder / "checkpoints" / "last.ckpt"
        test = ("test", "--config", f"{one.folder / 'config.yaml'}", "--ckpt_path", f"{last}")
        for words in (("fit", *one.fit), test):
            if failed.is_set():
                return
            if words is not test and time.monotonic() > end:
                print(f"no time left to begin {one.folder}")
                return
            try:
                organseg(*words)
                check()
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(jobs) as pool:
        for one in missing:
            begun[one.folder] = pool.submit(work, one)
        for future in begun.values():
            future.result()
