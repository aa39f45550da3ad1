"""The tables of cases and of organs as CSV files, `test/cases.csv` and `test/summary.csv` of a run (DESIGN.md 4).

Numbers are written with as many digits as it takes to read the same float64 again; what has no value is `nan`.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import BinaryIO

from organseg.errors import IntegrityError
from organseg.files import publish
from organseg.metrics.evaluate import OUTCOMES, OrganScore
from organseg.metrics.summary import METRICS, Average, CaseRow, OrganSummary

CASE_COLUMNS = ("case", "organ", *(field.name for field in fields(OrganScore)), "diagonal_mm")

_LINE_COLUMNS = tuple(field.name for field in fields(OrganSummary) if field.name not in METRICS)
SUMMARY_COLUMNS = _LINE_COLUMNS + tuple(f"{metric}_{field.name}" for metric in METRICS for field in fields(Average))


def write_case_table(path: Path, rows: Sequence[CaseRow]) -> None:
    """Write one line a case and organ; the file appears whole or not at all.

    Raises:
        StorageError: If the disk is full or the place cannot be written.
    """
    _write(path, CASE_COLUMNS, ((row.case, row.organ, *astuple(row.score), row.diagonal_mm) for row in rows))


def write_summary(path: Path, lines: Sequence[OrganSummary]) -> None:
    """Write one line an organ, as `summarise` gives them; the file appears whole or not at all.

    Raises:
        StorageError: If the disk is full or the place cannot be written.
    """
    _write(path, SUMMARY_COLUMNS, (_summary_cells(line) for line in lines))


def read_case_table(path: Path) -> list[CaseRow]:
    """Read what `write_case_table` wrote.

    Raises:
        IntegrityError: If the file is missing or is not such a table; the message names the file, the row and what was
            found.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            table = list(csv.reader(stream, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise IntegrityError(
            f"{path}: cannot be read as a table of cases ({error}); run `organseg test` again"
        ) from error
    header = tuple(table[0]) if table else ()
    if header != CASE_COLUMNS:
        raise IntegrityError(f"{path}: found columns {header}, expected {CASE_COLUMNS}; run `organseg test` again")
    return [_case_row(path, number, cells) for number, cells in enumerate(table[1:], start=1)]


def _write(path: Path, columns: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Write a CSV file; `csv` writes a float as `repr` does, its shortest form that reads back the same."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)

    def write(stream: BinaryIO) -> None:
        stream.write(text.getvalue().encode())

    publish(path, write)


def _summary_cells(line: OrganSummary) -> list[object]:
    """The cells of a line, in the order of `SUMMARY_COLUMNS`."""
    averages = [value for metric in METRICS for value in astuple(getattr(line, metric))]
    return [*(getattr(line, name) for name in _LINE_COLUMNS), *averages]


def _case_row(path: Path, number: int, cells: Sequence[str]) -> CaseRow:
    """One row of a table of cases.

    Raises:
        IntegrityError: If cells are missing, or one is not what its column holds.
    """
    problem = f"{path}: row {number}: found {list(cells)}, expected"
    remedy = "run `organseg test` again"
    if len(cells) != len(CASE_COLUMNS):
        raise IntegrityError(f"{problem} {len(CASE_COLUMNS)} cells; {remedy}")
    case, organ, named, *numbers = cells
    outcome = next((outcome for outcome in OUTCOMES if outcome == named), None)
    if outcome is None:
        raise IntegrityError(f"{problem} an outcome of {', '.join(OUTCOMES)}; {remedy}")
    try:
        *scores, diagonal_mm = [float(number) for number in numbers]
    except ValueError as error:
        raise IntegrityError(f"{problem} numbers ({error}); {remedy}") from error
    return CaseRow(case, organ, OrganScore(outcome, *scores), diagonal_mm)
