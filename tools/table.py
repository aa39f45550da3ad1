"""Runs side by side: mean DSC % of each organ on the test patients, as a Markdown table.

Usage: python tools/table.py runs/btcv_100_inerrant0 runs/btcv_30_inerrant0 ...
"""

import argparse
import csv
from pathlib import Path


def mean_dsc(run: Path) -> dict[str, float]:
    """Organ -> mean DSC over the test cases, `mean` last."""
    with (run / "test" / "summary.csv").open() as file:
        return {row["organ"]: float(row["dsc_mean"]) for row in csv.DictReader(file)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    runs = parser.parse_args().runs
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    scores = {name: mean_dsc(run) for name, run in zip(names, runs, strict=True)}
    organs = list(dict.fromkeys(organ for column in scores.values() for organ in column))
    width = max(map(len, organs))
    print(f"| {'DSC %':<{width}} | " + " | ".join(scores) + " |")
    print("|---|" + "---:|" * len(scores))
    for organ in organs:
        cells = (f"{100 * column.get(organ, float('nan')):>{len(name)}.1f}" for name, column in scores.items())
        print(f"| {organ:<{width}} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
