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
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev

from compared import is_finished, refuse_another_setup, refuse_unequal
from paired import Known, Scores, all_dsc_of, dsc_of, show_tests
from trained import Training, train

from organseg.errors import OrgansegError
from organseg.runtime.run_folder import DATA

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "experiment"
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


def scores(arguments: argparse.Namespace, of: Callable[[Path], Known]) -> Scores:
    """Network -> seed -> (organ, case) -> DSC, of what is finished."""
    found: Scores = defaultdict(dict)
    for network, seed, run in folders(arguments):
        if is_finished(run):
            found[network][seed] = of(run)
    return found


def show(found: Scores, out: Path) -> None:
    """DSC of each network and organ, over all cases that know it; mean and std over seeds."""
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


def main() -> None:
    """Train what is missing, then show the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/networks"))
    parser.add_argument("--prefix", default="btcv_100", help="of the experiments' names")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this; 0: tables only")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, for a GPU that one does not fill")
    arguments, more = parser.parse_known_args()
    try:
        refuse_unequal_runs(arguments)
        if arguments.minutes > 0:
            work(arguments, more)
    except OrgansegError as error:
        parser.exit(error.exit_code, f"networks: {error}\n")
    show(scores(arguments, all_dsc_of), arguments.out / arguments.prefix)
    present = scores(arguments, dsc_of)
    if present:
        show_tests(present)


if __name__ == "__main__":
    main()
