"""Networks against one another: the same data, fold, seeds and steps; tables and paired tests over cases.

Each step is the command that a user would type; what is finished is skipped and what was stopped goes on. Runs with
another setup than what is asked for, or than each other, are refused. `--prefix` names the experiments: `btcv_100` runs
configs/experiment/btcv_100_<network>.yaml. A case's value is its mean over the seeds, so that a seed is no patient of
its own; the tests compare each network with the first one.

Usage: python tools/networks.py --cache cache --out runs/networks --prefix btcv_100 --seeds 0 1 --minutes 100
Unknown options, as --option=value, go to every `fit`.
"""

import argparse
import csv
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev

from compared import refuse_another_setup, refuse_unequal

from organseg.errors import OrgansegError
from organseg.metrics import read_case_table
from organseg.metrics.statistics import PairedComparison, compare_paired, holm
from organseg.runtime.run_folder import DATA

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "experiment"
NETWORKS = ("unet", "attention_unet", "mhsa", "mhca", "utransformer")

Scores = dict[str, dict[int, dict[tuple[str, str], float]]]
"""Network -> seed -> (organ, case) -> DSC."""


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
    end = time.monotonic() + 60 * arguments.minutes
    fits = {
        run: ["fit", "--config", f"{CONFIGS / f'{arguments.prefix}_{network}.yaml'}", "--out", f"{run}",
              "--data.init_args.cache", f"{arguments.cache}", "--seed", f"{seed}", *more]
        for network, seed, run in folders(arguments)
    }  # fmt: skip
    missing = [run for run in fits if not (run / "test" / "summary.csv").exists()]
    for run, fit in fits.items():
        if run not in missing:
            refuse_another_setup(fit)
    for run in missing:
        if time.monotonic() > end:
            print(f"no time left to begin {run}")
            return
        test = ["test", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]
        for words in (fits[run], test):
            print("$ organseg " + " ".join(words), flush=True)
            subprocess.run([sys.executable, "-m", "organseg", *words], check=True)
            refuse_unequal_runs(arguments)


def scores(arguments: argparse.Namespace) -> Scores:
    """Network -> seed -> (organ, case) -> DSC, of what is finished; unknown organs left out."""
    found: Scores = defaultdict(dict)
    for network, seed, run in folders(arguments):
        if (run / "test" / "summary.csv").exists():
            rows = read_case_table(run / "test" / "cases.csv")
            known = {(row.organ, row.case): row.score.dsc for row in rows if row.score.outcome != "unknown"}
            found[network][seed] = known
    return found


def show(found: Scores, out: Path) -> None:
    """DSC of each network and organ, mean and std over seeds, and the tests of the means over organs and seeds."""
    if not found:
        return
    lines = [[network, seed, *place, f"{value:.6f}"] for network, seeds in found.items()
             for seed, known in seeds.items() for place, value in known.items()]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with (out / "cases.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["network", "seed", "organ", "case", "dsc"], *lines])
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
    show_tests(found)


def show_tests(found: Scores) -> None:
    """Each network against the first, over cases; p-values with Holm's correction over the networks."""
    first = next(iter(found))
    print(f"\nDifference to {first} in points of DSC, over cases (mean over organs and common seeds):")
    for name, one, p in tests_of(found, None):
        difference, interval = in_points(one)
        tests = f"t-test p {one.t_test_p:.2g}, Wilcoxon p {one.wilcoxon_p:.2g}, with Holm {p:.2g}"
        print(f"{name}: {difference} (95% {interval}), {one.cases} cases, {tests}")
    print("\nThe same for each organ, with Holm's correction over the networks.")
    print("| organ | network | cases | difference | 95% | t-test p | Wilcoxon p | with Holm |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for organ in dict.fromkeys(organ for known in found[first].values() for organ, _ in known):
        for name, one, p in tests_of(found, organ):
            p_values = f"{one.t_test_p:.2g} | {one.wilcoxon_p:.2g} | {p:.2g}"
            print(f"| {organ} | {name} | {one.cases} | {' | '.join(in_points(one))} | {p_values} |")


def tests_of(found: Scores, organ: str | None) -> list[tuple[str, PairedComparison, float]]:
    """Network, its comparison with the first over the cases that both know, and Wilcoxon's p with Holm's correction.

    Args:
        found: See `scores`.
        organ: The organ; None for the mean over all of them.
    """
    first, *others = found
    compared: dict[str, PairedComparison] = {}
    for other in others:
        seeds = found[first].keys() & found[other].keys()
        ours, theirs = (means_of([found[name][seed] for seed in seeds], organ) for name in (other, first))
        cases = sorted(ours.keys() & theirs.keys())
        if len(cases) > 1:
            compared[other] = compare_paired([ours[case] for case in cases], [theirs[case] for case in cases])
    corrected = holm([one.wilcoxon_p for one in compared.values()])
    return [(name, one, float(p)) for (name, one), p in zip(compared.items(), corrected, strict=True)]


def means_of(seeds: Sequence[dict[tuple[str, str], float]], organ: str | None) -> dict[str, float]:
    """Case -> its mean over seeds, and over organs where none is named."""
    values: dict[str, list[float]] = defaultdict(list)
    for known in seeds:
        for (of, case), value in known.items():
            if organ in (None, of):
                values[case].append(value)
    return {case: fmean(some) for case, some in values.items()}


def in_points(one: PairedComparison) -> tuple[str, str]:
    """The difference and its interval, in points of DSC."""
    low, mean, high = (f"{100 * value:+.1f}" for value in (one.low, one.mean_difference, one.high))
    return mean, f"{low} to {high}"


def main() -> None:
    """Train what is missing, then show the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/networks"))
    parser.add_argument("--prefix", default="btcv_100", help="of the experiments' names")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this; 0: tables only")
    arguments, more = parser.parse_known_args()
    try:
        refuse_unequal_runs(arguments)
        if arguments.minutes > 0:
            work(arguments, more)
    except OrgansegError as error:
        parser.exit(error.exit_code, f"networks: {error}\n")
    show(scores(arguments), arguments.out / arguments.prefix)


if __name__ == "__main__":
    main()
