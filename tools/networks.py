"""Networks against one another: the same data, fold, seeds and steps; tables and paired tests over cases.

Each step is the command that a user would type; what is finished is skipped and what was stopped goes on. Runs with
another setup than what is asked for, or than each other, are refused. `--prefix` names the experiments: `btcv_100` runs
configs/experiment/btcv_100_<network>.yaml. A case's value is its mean over the seeds, so that a seed is no patient of
its own; the tests compare each network with the first one. Every organ of every case also goes to `PREFIX.csv` in
`--tables`, and what that has of runs that are gone is shown with the rest, never of two precisions.

Usage: python tools/networks.py --cache cache --out runs/networks --prefix btcv_100 --seeds 0 1 --minutes 100
Unknown options, as --option=value, go to every `fit`.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from statistics import fmean, stdev

from compared import is_finished, refuse_another_setup, refuse_unequal
from paired import PRESENT, Scores, show_tests
from relabelling import rows_of, write
from trained import Training, train

from organseg.errors import IntegrityError, OrgansegError
from organseg.metrics import read_case_table
from organseg.runtime.run_folder import DATA, RunFolder

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "experiment"
COLUMNS = ("network", "seed", "computed_in", "organ", "case", "outcome", "dsc")
"""Of the table."""
KNOWN = ("both_empty", "missed", "false_positive", "found")
"""Outcomes of an organ that a case annotates."""
NETWORKS = ("unet", "attention_unet", "mhsa", "mhca", "utransformer")


def folders(arguments: argparse.Namespace) -> Iterator[tuple[str, int, Path]]:
    """Network, seed and run folder; seeds outside, so that each seed is complete before the next."""
    for seed in arguments.seeds:
        for network in arguments.networks:
            yield network, seed, arguments.out / arguments.prefix / f"seed{seed}" / network


def refuse_unequal_runs(arguments: argparse.Namespace) -> None:
    """Refuse runs of which more is unequal than network and seed, and of a seed more than the network."""
    refuse_unequal([run for *_, run in folders(arguments)], ("model.", "seed", "data.seed", DATA))
    for seed in arguments.seeds:  # it draws patients and labels where not all are used
        refuse_unequal([run for _, of, run in folders(arguments) if of == seed], ("model.",))


def work(arguments: argparse.Namespace, more: list[str]) -> None:
    """Train and test what is not finished, while there is time to begin."""
    fits = {
        run: ["--config", f"{CONFIGS / f'{arguments.prefix}_{network}.yaml'}", "--out", f"{run}",
              "--data.init_args.cache", f"{arguments.cache}", "--seed", f"{seed}", *more]
        for network, seed, run in folders(arguments)
    }  # fmt: skip
    missing = []
    for run, fit in fits.items():
        if is_finished(run):
            refuse_another_setup(["fit", *fit])
        else:
            missing.append(Training(run, fit))
    train(missing, arguments.minutes, arguments.jobs, lambda: refuse_unequal_runs(arguments))


def lines_of(arguments: argparse.Namespace, table: Path) -> list[dict[str, str]]:
    """A line for each organ of each test case: of what is finished, and of what the table has of other runs.

    Raises:
        IntegrityError: If the table is broken, or what was asked for was computed in more than one precision.
    """
    lines, asked = [], set()
    for network, seed, run in folders(arguments):
        asked.add((network, str(seed)))
        if not is_finished(run):
            continue
        record = RunFolder(run).record()
        assert record is not None
        precision = str(record["identity"]["trainer.precision"])
        for row in read_case_table(run / "test" / "cases.csv"):
            values = network, str(seed), precision, row.organ, row.case, row.score.outcome, f"{row.score.dsc:.6f}"
            lines.append(dict(zip(COLUMNS, values, strict=True)))
    ours = {(line["network"], line["seed"]) for line in lines}
    lines += [line for line in known_lines(table) if (line["network"], line["seed"]) not in ours]
    precisions = {line["computed_in"] for line in lines if (line["network"], line["seed"]) in asked}
    if len(precisions) > 1:
        raise IntegrityError(
            f"{table}: what is asked for was computed in {' and '.join(sorted(precisions))}: not to be compared; "
            "take another --tables, or other --seeds"
        )
    return sorted(lines, key=lambda line: int(line["seed"]))


def known_lines(table: Path) -> list[dict[str, str]]:
    """The lines of a table, if there is one.

    Raises:
        IntegrityError: If it is broken, or of another version.
    """
    try:
        lines = rows_of(table) if table.exists() else []
    except (csv.Error, ValueError) as error:
        raise IntegrityError(f"{table}: found no table ({error}); move it away") from error
    for number, line in enumerate(lines, start=2):
        try:
            whole = tuple(line) == COLUMNS and None not in line.values()
            int(line["seed"]), float(line["dsc"])
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise IntegrityError(
                f"{table}, line {number}: found {', '.join(map(str, line.values()))}, expected {', '.join(COLUMNS)}: "
                "broken, or of another version; move it away"
            )
    return lines


def scores(arguments: argparse.Namespace, lines: Iterable[dict[str, str]], outcomes: Collection[str]) -> Scores:
    """Network -> seed -> (organ, case) -> DSC, of these outcomes; networks in the order asked for."""
    found: Scores = {network: defaultdict(dict) for network in arguments.networks}
    for line in lines:
        if line["network"] in found and int(line["seed"]) in arguments.seeds and line["outcome"] in outcomes:
            found[line["network"]][int(line["seed"])][line["organ"], line["case"]] = float(line["dsc"])
    return {network: seeds for network, seeds in found.items() if seeds}


def show(found: Scores) -> None:
    """DSC of each network and organ, over all cases that know it; mean and std over seeds."""
    organs = list(dict.fromkeys(organ for seeds in found.values() for known in seeds.values() for organ, _ in known))
    print("\n| network | seeds | " + " | ".join(organs) + " | mean |\n|---|---:|" + "---:|" * (len(organs) + 1))
    for network, seeds in found.items():
        by_organ = [
            [fmean(v for (o, _), v in known.items() if o == organ) for known in seeds.values()] for organ in organs
        ]
        means = [fmean(values) for values in zip(*by_organ, strict=True)]
        cells = (f"{100 * fmean(values):.1f}" + (f" ({100 * stdev(values):.1f})" if len(values) > 1 else "")
                 for values in (*by_organ, means))  # fmt: skip
        print(f"| {network} | {len(seeds)} | " + " | ".join(cells) + " |")


def main() -> None:
    """Train what is missing, then show the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/networks"))
    parser.add_argument("--prefix", default="btcv_100", help="of the experiments' names")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tables", type=Path, help="folder of PREFIX.csv; default: OUT")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this; 0: tables only")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, for a GPU that one does not fill")
    arguments, more = parser.parse_known_args()
    tables = arguments.tables or arguments.out
    table = tables / f"{arguments.prefix}.csv"
    try:
        refuse_unequal_runs(arguments)
        lines_of(arguments, table)  # what it refuses is said before hours of training
        if arguments.minutes > 0:
            work(arguments, more)
        lines = lines_of(arguments, table)
    except OrgansegError as error:
        parser.exit(error.exit_code, f"networks: {error}\n")
    if lines:
        tables.mkdir(parents=True, exist_ok=True)
        write(table, lines)
    if found := scores(arguments, lines, KNOWN):
        show(found)
    if len(found) > 1:
        show_tests(scores(arguments, lines, PRESENT))


if __name__ == "__main__":
    main()
