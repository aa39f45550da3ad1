"""The tables of a run's relabelling rounds, `NN_roundT_relabel/{cases,organs}.csv`, as records (METHOD.md 1.5, 1.6).

Columns are found by name, and others may be there: tables of older and newer versions are read alike. A round whose
tables are not there is not finished; the rounds before it are shown all the same.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path

from organseg.errors import IntegrityError

RATES = ("precision", "recall", "score_auc", "probability_auc", "score_ap_success", "probability_ap_success",
         "score_ap_error", "probability_ap_error")  # fmt: skip
"""Columns of `organs.csv` that are empty where no truth is hidden."""

_PHASE = re.compile(r"\d+_round(\d+)_relabel")
_PLAUSIBLE = ("yes", "low", "high", "none", "unknown")
_REMEDY = "restore it, or move it away for a report without this round"


@dataclass(frozen=True)
class OrganLine:
    """One organ in one round, over all cases that lack it.

    Attributes:
        organ: Canonical name.
        candidates: Voxels that could have been added.
        added: Voxels that carry a pseudo-label of the organ.
        added_now: Of these, those of this round; all of them in tables of older versions.
        rates: Column of `RATES` -> share of 1, NaN where it is empty or not there.
    """

    organ: str
    candidates: int
    added: int
    added_now: int
    rates: Mapping[str, float]


@dataclass(frozen=True)
class CaseLine:
    """One organ that one case does not annotate, in one round.

    Attributes:
        case: `<data set>/<id>`.
        organ: Canonical name.
        added: Voxels that carry a pseudo-label.
        volume_ml: Of these.
        taken_ml: Of all that is taken for the organ, added or not; of what was added in tables of older versions.
        plausible: `yes`, `low`, `high`; `none` where nothing was added, `unknown` where `anatomy` has no range.
        pieces: Connected components of what was added.
        right: Voxels that the hidden truth confirms; None where no truth is hidden.
        missing: Voxels of the hidden truth; None likewise.
    """

    case: str
    organ: str
    added: int
    volume_ml: float
    taken_ml: float
    plausible: str
    pieces: int
    right: int | None
    missing: int | None

    @property
    def wrong(self) -> int:
        """Voxels that the hidden truth denies."""
        return self.added - (self.right or 0)

    @property
    def precision(self) -> float:
        """Share of the pseudo-labels that is right; NaN where unknown."""
        return self.right / self.added if self.right is not None and self.added else nan

    @property
    def recall(self) -> float:
        """Share of the hidden truth that is found; NaN where unknown, or where the organ is not there."""
        return self.right / self.missing if self.right is not None and self.missing else nan


@dataclass(frozen=True)
class RoundTables:
    """A relabelled round.

    Attributes:
        index: From 1.
        labels: Folder of its pseudo-labels.
        organs: In channel order.
        cases: Ordered by case, then channel.
    """

    index: int
    labels: Path
    organs: tuple[OrganLine, ...]
    cases: tuple[CaseLine, ...]

    @property
    def known(self) -> list[CaseLine]:
        """Where hidden truth says what is right."""
        return [line for line in self.cases if line.right is not None]

    @property
    def unknown(self) -> list[CaseLine]:
        """Where nobody knows what is right."""
        return [line for line in self.cases if line.right is None]


def read_rounds(run: Path, notes: list[str]) -> list[RoundTables]:
    """The relabelled rounds of a run, in order; none for a run without rounds.

    Args:
        run: Its folder.
        notes: Gets a line for a round that has begun and has no tables.

    Raises:
        IntegrityError: If a table cannot be read as one.
    """
    found = {int(match[1]): path for path in run.iterdir() if (match := _PHASE.fullmatch(path.name)) and path.is_dir()}
    rounds = []
    for index, folder in sorted(found.items()):
        missing = [name for name in ("organs.csv", "cases.csv") if not (folder / name).is_file()]
        if missing:
            notes.append(
                f"round {index} is left out: {folder} has no {' and no '.join(missing)}; a round has them once all "
                "its cases are relabelled"
            )
            continue
        organs, cases = read_organs(folder / "organs.csv"), read_cases(folder / "cases.csv")
        rounds.append(RoundTables(index, run / "pseudo_labels" / f"round_{index}", tuple(organs), tuple(cases)))
    return rounds


def read_organs(path: Path) -> list[OrganLine]:
    """A round's table of organs.

    Raises:
        IntegrityError: If it cannot be read as one.
    """
    lines = []
    for number, row in _rows(path, ("organ", "candidates", "added")):
        rates = {name: _number(path, number, row.get(name, "")) for name in RATES}
        candidates, added = (_count(path, number, row[name]) for name in ("candidates", "added"))
        added_now = _count(path, number, row.get("added_now", row["added"]))
        lines.append(OrganLine(row["organ"], candidates, added, added_now, rates))
    return lines


def read_cases(path: Path) -> list[CaseLine]:
    """A round's table of cases.

    Raises:
        IntegrityError: If it cannot be read as one.
    """
    lines = []
    for number, row in _rows(path, ("case", "organ", "added", "volume_ml", "plausible", "pieces")):
        if row["plausible"] not in _PLAUSIBLE:
            raise _broken(path, number, row["plausible"], f"one of {', '.join(_PLAUSIBLE)}")
        right, missing = (_count(path, number, row[name]) if row.get(name) else None for name in ("right", "missing"))
        lines.append(
            CaseLine(
                row["case"],
                row["organ"],
                _count(path, number, row["added"]),
                _number(path, number, row["volume_ml"]),
                _number(path, number, row.get("taken_ml") or row["volume_ml"]),
                row["plausible"],
                _count(path, number, row["pieces"]),
                right,
                missing,
            )
        )
    return lines


def _rows(path: Path, required: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Number and cells of each row; a table of no rows may lack its head."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            table = list(csv.reader(stream, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise IntegrityError(f"{path}: cannot be read as a table ({error}); {_REMEDY}") from error
    if not table:
        return []
    head = table[0]
    lacking = [name for name in required if name not in head]
    if lacking:
        raise IntegrityError(f"{path}: found columns {head}, expected also {', '.join(lacking)}; {_REMEDY}")
    for number, cells in enumerate(table[1:], start=1):
        if len(cells) != len(head):
            raise _broken(path, number, str(cells), f"{len(head)} cells")
    return [(number, dict(zip(head, cells, strict=True))) for number, cells in enumerate(table[1:], start=1)]


def _count(path: Path, number: int, cell: str) -> int:
    if not (cell.isascii() and cell.isdigit() and len(cell) < 19):
        raise _broken(path, number, cell, "a count")
    return int(cell)


def _number(path: Path, number: int, cell: str) -> float:
    """NaN where it is empty."""
    try:
        value = float(cell) if cell else nan
    except ValueError as error:
        raise _broken(path, number, cell, "a number") from error
    if cell and not isfinite(value):
        raise _broken(path, number, cell, "a finite number")
    return value


def _broken(path: Path, number: int, found: str, expected: str) -> IntegrityError:
    return IntegrityError(f"{path}: row {number}: found {found!r}, expected {expected}; {_REMEDY}")
