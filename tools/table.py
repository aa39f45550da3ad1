"""Runs side by side: mean DSC % of each organ on the test patients, as a Markdown table.

A folder that `organseg evaluate` wrote counts as a run. `--pool NAME=RUN,RUN,...` makes one column of the test patients
of several runs, for example of all folds; `--paired` adds tests over the patients that a column shares with the first.

Usage: python tools/table.py runs/btcv_100_inerrant0 runs/btcv_30_inerrant0 ...
       python tools/table.py --paired --pool ours=runs/fold_0,runs/fold_1 --pool theirs=scores_0,scores_1
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from paired import Scores, known_of, show_tests

from organseg.errors import OrgansegError
from organseg.metrics import CaseRow, read_case_table, summarise


def case_rows(run: Path) -> list[CaseRow]:
    """Of a run's test, or of a folder that `organseg evaluate` wrote."""
    tested = run / "test" / "cases.csv"
    return read_case_table(tested if tested.exists() else run / "cases.csv")


def mean_dsc(rows: Sequence[CaseRow]) -> dict[str, float]:
    """Organ -> mean DSC over the test cases, `mean` last."""
    return {line.organ: line.dsc.mean for line in summarise(rows)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", default=[])
    parser.add_argument("--pool", action="append", default=[], metavar="NAME=RUN,RUN", help="one column of several")
    parser.add_argument("--paired", action="store_true", help="tests over cases, of each column against the first")
    arguments = parser.parse_args()
    names = [run.name for run in arguments.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in arguments.runs]
    try:
        columns = {name: case_rows(run) for name, run in zip(names, arguments.runs, strict=True)}
        for name, _, runs in (pool.partition("=") for pool in arguments.pool):
            columns[name] = [row for run in runs.split(",") for row in case_rows(Path(run))]
    except OrgansegError as error:
        parser.exit(error.exit_code, f"table: {error}\n")
    for name in columns:
        cases = {(row.case, row.organ) for row in columns[name]}
        if len(cases) < len(columns[name]):
            parser.error(f"{name}: a case was tested by two of its runs")
    if not columns:
        parser.error("name runs, or a --pool of them")
    scores = {name: mean_dsc(rows) for name, rows in columns.items()}
    organs = list(dict.fromkeys(organ for column in scores.values() for organ in column))
    width = max(map(len, organs))
    print(f"| {'DSC %':<{width}} | " + " | ".join(scores) + " |")
    print("|---|" + "---:|" * len(scores))
    for organ in organs:
        cells = (f"{100 * column.get(organ, float('nan')):>{len(name)}.1f}" for name, column in scores.items())
        print(f"| {organ:<{width}} | " + " | ".join(cells) + " |")
    if arguments.paired and len(columns) > 1:
        found: Scores = {name: {0: known_of(rows)} for name, rows in columns.items()}
        show_tests(found)


if __name__ == "__main__":
    main()
