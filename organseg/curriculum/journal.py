"""The journal of a curriculum: which phases are finished, and that their results are still what they were.

`RUN/journal.jsonl` gets one fsynced line for each *finished* phase. A line names its parent (the digest of the line
before, at first of the run's identity) and the digests of its results; a phase counts as done when its line is chained
and its results verify. The line is what makes a round's pseudo-labels the current ones: nothing else decides.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from organseg.errors import IntegrityError, StorageError


@dataclass(frozen=True)
class Entry:
    """One finished phase.

    Attributes:
        phase: Its name.
        parent: Digest of what it follows from.
        outputs: Path below the run -> digest of a result.
        score: Mean DSC of the validation cases, where it was asked for.
    """

    phase: str
    parent: str
    outputs: dict[str, str]
    score: float | None = None

    @property
    def digest(self) -> str:
        """Of the whole line."""
        return digest_of(self.__dict__)


def digest_of(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def chain(path: Path, root: str) -> list[Entry]:
    """The lines of a journal that follow from `root`, one after another; their results may be gone."""
    entries = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            entry = Entry(**json.loads(line))
            dict(entry.outputs)
            entries[entry.parent] = entry
        except (ValueError, TypeError):
            continue  # torn by a kill, or not ours: that phase is not finished
    found: list[Entry] = []
    while (after := entries.pop(found[-1].digest if found else root, None)) is not None:
        found.append(after)
    return found


class Journal:
    """The journal of one run.

    Args:
        run: The run folder.
        digest: Digest of a result file; raises where it is damaged or missing.
    """

    def __init__(self, run: Path, digest: Callable[[Path], str]) -> None:
        self.run = run
        self.path = run / "journal.jsonl"
        self.digest = digest

    def finished(self, phases: Sequence[str], root: str) -> list[Entry]:
        """The leading phases whose lines are chained from `root`.

        Raises:
            IntegrityError: If a result of one of them is damaged or missing.
        """
        known = chain(self.path, root)
        found = [
            entry for entry, _ in takewhile(lambda both: both[0].phase == both[1], zip(known, phases, strict=False))
        ]
        for entry in found:
            for name, digest in entry.outputs.items():
                if self._is_not(name, digest):
                    raise self._changed(entry, name)
        return found

    def _is_not(self, name: str, digest: str) -> bool:
        try:
            return self.digest(self.run / name) != digest
        except IntegrityError:
            return True

    def append(self, entry: Entry) -> None:
        """Write a line, durably; it begins with a line end, so that a torn one before it does no harm.

        Raises:
            StorageError: If it cannot be written.
        """
        try:
            with self.path.open("ab") as file:
                file.write(b"\n" + json.dumps(entry.__dict__, sort_keys=True).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written: {error.strerror}; free space, then run again"
            ) from error

    def _changed(self, entry: Entry, name: str) -> IntegrityError:
        return IntegrityError(
            f"{self.run / name}: changed or removed since {entry.phase} was finished; restore it, or remove the lines "
            f"from {entry.phase} on in {self.path} and run the same `fit` again, which then does them again"
        )
