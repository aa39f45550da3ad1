"""Networks against one another: the same data, fold, seeds and steps; tables and paired tests over cases.

Each step is the command that a user would type; what is finished is skipped and what was stopped goes on. `--prefix`
names the experiments: `btcv_100` runs configs/experiment/btcv_100_<network>.yaml. A case's value is its mean over the
seeds, so that a seed is no patient of its own; the tests compare each network with the first one.

Usage: python tools/networks.py --cache cache --out runs/networks --prefix btcv_100 --seeds 0 1 --minutes 100
Unknown options, as --option=value, go to every `fit`.
"""

import argparse
import csv
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev

from organseg.metrics import read_case_table
from organseg.metrics.statistics import compare_paired, holm

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "experiment"
NETWORKS = ("unet", "attention_unet", "mhsa", "mhca", "utransformer")


def folders(arguments: argparse.Namespace) -> Iterator[tuple[str, int, Path]]:
    """Network, seed and run folder; seeds outside, so that each seed is complete before the next."""
    for seed in arguments.seeds:
        for network in arguments.networks:
            yield network, seed, arguments.out / arguments.prefix / f"seed{seed}" / network


def work(arguments: argparse.Namespace, more: list[str]) -> None:
    """Train and test what is not finished, while there is time to begin."""
    end = time.monotonic() + 60 * arguments.minutes
    for network, seed, run in folders(arguments):
        if (run / "test" / "summary.csv").exists():
            continue
        if time.monotonic() > end:
            print(f"no time left to begin {run}")
            return
        config = CONFIGS / f"{arguments.prefix}_{network}.yaml"
        fit = ["fit", "--config", f"{config}", "--out", f"{run}", "--data.init_args.cache", f"{arguments.cache}",
               "--seed", f"{seed}", *more]  # fmt: skip
        test = ["test", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]
        for words in (fit, test):
            print("$ organseg " + " ".join(words), flush=True)
            subprocess.run([sys.executable, "-m", "organseg", *words], check=True)


def scores(arguments: argparse.Namespace) -> dict[str, dict[int, dict[tuple[str, str], float]]]:
    """Network -> seed -> (organ, case) -> DSC, of what is finished; unknown organs left out."""
    found: dict[str, dict[int, dict[tuple[str, str], float]]] = defaultdict(dict)
    for network, seed, run in folders(arguments):
        if (run / "test" / "summary.csv").exists():
            rows = read_case_table(run / "test" / "cases.csv")
            known = {(row.organ, row.case): row.score.dsc for row in rows if row.score.outcome != "unknown"}
            found[network][seed] = known
    return found


def show(found: dict[str, dict[int, dict[tuple[str, str], float]]], out: Path) -> None:
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


def show_tests(found: dict[str, dict[int, dict[tuple[str, str], float]]]) -> None:
    """Each network against the first, over cases; p-values with Holm's correction over the networks."""
    first, *others = found
    compared = {}
    for other in others:
        both = sorted(found[first].keys() & found[other].keys())
        cases = sorted({case for seed in both for _, case in found[first][seed]})
        if len(cases) > 1:
            values = (
                [fmean(v for seed in both for (_, c), v in found[name][seed].items() if c == case) for case in cases]
                for name in (other, first)
            )
            compared[other] = compare_paired(*values)
    corrected = holm([one.wilcoxon_p for one in compared.values()])
    print(f"\nDifference to {first} in points of DSC, over cases (mean over organs and common seeds):")
    for (name, one), p in zip(compared.items(), corrected, strict=True):
        low, mean, high = (f"{100 * value:+.1f}" for value in (one.low, one.mean_difference, one.high))
        tests = f"t-test p {one.t_test_p:.2g}, Wilcoxon p {one.wilcoxon_p:.2g}, with Holm {p:.2g}"
        print(f"{name}: {mean} (95% {low} to {high}), {one.cases} cases, {tests}")


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
    if arguments.minutes > 0:
        work(arguments, more)
    show(scores(arguments), arguments.out / arguments.prefix)


if __name__ == "__main__":
    main()
