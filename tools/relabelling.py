"""The relabelling experiments of protocol S (METHOD.md 7): methods, label shares and seeds, and their tables.

Every method of a share, fold and seed has the same hidden labels and number of optimiser steps; those with rounds share
one round 0, which is also the coarse model of STIPPLE and what it goes on from. Each step is the command that a user
would type; what is finished is skipped and what was stopped goes on, so that the script can be run again and again,
with `--minutes` for as long as there is time. Tables are made of what is finished, and of what `results.csv` and
`rounds.csv` in `--tables` have of runs that are gone (`cases.csv` beside them has the patients): mean and standard
deviation over folds and seeds, in Markdown, never over two precisions; then paired tests over cases against INERRANT0,
INERRANT, and STIPPLE's schedules without a prior. Folds say more than seeds: they are other patients. Finished runs
that differ from what is asked for, or from each other in more than the method, or in the sum of their steps, are
refused.

Usage: python tools/relabelling.py --cache cache --out runs/relabelling --shares 30 10 --folds 0 1 2 --minutes 100
Options that it does not know, as --option=value, go to every `fit`; those of the curriculum where there is one.
"""

import argparse
import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from compared import COARSE, is_finished, refuse_another_setup, refuse_unequal, refuse_unequal_methods
from paired import Scores, dsc_of, show_tests
from trained import Training, train

from organseg.errors import IntegrityError, OrgansegError
from organseg.files import publish_text
from organseg.metrics import OVERALL, read_case_table
from organseg.runtime.run_folder import DATA, RunFolder

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "experiment"
OTHER = "stipple0_other"
"""With the priors of another run, of `--prior`."""
METHODS = ("inerrant", "inerrant0", "smile", "pseudo_labels", "inerrant_thesis", "inerrant_judges", "naive", "stipple0",
           "stipple", "plain0", "plain", OTHER, "inerrant_stipple", "inerrant_drawn", "judges_once",
           "mcp_once")  # fmt: skip
ONCE = ("--curriculum.rounds=1", "--curriculum.gamma_max=1.0", "--curriculum.round_steps=1200",
        "--curriculum.start=scratch", "--curriculum.selection.max_volume=1.5")  # fmt: skip
"""INERRANT's schedule, and all that looks like an organ."""
CHANGED = {
    "plain0": ("stipple0", ("--model.init_args.use=[]",)),
    "plain": ("stipple", ("--model.init_args.use=[]",)),
    OTHER: ("stipple0", ()),
    "inerrant_drawn": ("inerrant", ("--data.init_args.draw_annotated_only=true",)),
    "judges_once": ("inerrant_judges", ONCE),
    "mcp_once": ("inerrant_judges", (*ONCE, "--curriculum.score=mcp")),
}
"""STIPPLE's schedule without a prior, with and without relabelling, and with the priors of `--prior`; INERRANT whose
draws by organ show annotations alone; INERRANT's judges with its schedule, and the probability in their place."""
WITHOUT_ROUNDS = ("inerrant0", "naive", "stipple0", "plain0", OTHER)
FROM_ROUND0 = ("stipple0", "stipple", "inerrant_stipple", "plain0", "plain", OTHER)
ROUND0 = "round0"
KEYS = ("dataset", "label_share_percent", "fold", "seed", "method", "computed_in")
"""Of the tables' lines."""


@dataclass(frozen=True)
class Run:
    """One training; its folder: `OUT/<data set>/<share>/seed<seed>/<method>`, or `fold<fold>_seed<seed>` but for 0."""

    out: Path
    dataset: str
    share: int
    seed: int
    method: str
    fold: int = 0

    @property
    def folder(self) -> Path:
        """Where it lies."""
        of = f"fold{self.fold}_seed{self.seed}" if self.fold else f"seed{self.seed}"
        return self.out / self.dataset / str(self.share) / of / self.method

    @property
    def line(self) -> dict[str, str]:
        """What its lines in the tables begin with."""
        values = (self.dataset, str(self.share), str(self.fold), str(self.seed), self.method, self.precision)
        return dict(zip(KEYS, values, strict=True))

    @property
    def precision(self) -> str:
        """In which it was computed."""
        record = RunFolder(self.folder).record()
        assert record is not None
        return str(record["identity"]["trainer.precision"])

    @property
    def finished(self) -> bool:
        """Whether it is trained to its end, and tested."""
        return is_finished(self.folder)

    def fit_words(self, cache: Path, round0_steps: int, more: Sequence[str]) -> list[str]:
        """What to type after `organseg fit`."""
        method, changes = CHANGED.get(self.method, (self.method, ()))
        with_rounds = self.method not in (ROUND0, *WITHOUT_ROUNDS)
        config = CONFIGS / f"{self.dataset}_{self.share}_{method}.yaml"
        given = config.exists()
        words = ["--config", f"{config if given else CONFIGS / f'{self.dataset}_30_{method}.yaml'}",
                 "--out", f"{self.folder}", "--data.init_args.cache", f"{cache}", "--seed", f"{self.seed}"]  # fmt: skip
        words += [] if given else ["--data.init_args.label_share", f"{self.share / 100}"]
        words += ["--data.init_args.fold", f"{self.fold}"] if self.fold else []
        words += [
            word for word in more
            if (with_rounds or not word.startswith("--curriculum."))
            and not any(word.startswith(f"{change.partition('=')[0]}.") for change in changes)
        ]  # fmt: skip
        words += changes
        if self.method == ROUND0:
            words += ["--trainer.max_steps", f"{round0_steps}"]
        if self.method in FROM_ROUND0:
            words += ["--model.init_args.coarse", f"{self.folder.parent / ROUND0 / 'checkpoints' / 'last.ckpt'}"]
        elif with_rounds:
            words += ["--curriculum.round0", f"{self.folder.parent / ROUND0}"]
        return words


def plan(arguments: argparse.Namespace) -> Iterator[Run]:
    """All runs, in the order in which they are wanted: seed by seed, fold by fold, the shared round 0 first."""
    for seed, fold in product(arguments.seeds, arguments.folds):
        for share in arguments.shares:
            methods = [method for method in METHODS if method in arguments.methods]
            if share == 100:  # there is nothing to find
                methods = [method for method in methods if method in WITHOUT_ROUNDS]
            if set(methods) - {"inerrant0", "naive"}:
                methods = [ROUND0, *methods]
            for method in methods:
                yield Run(arguments.out, arguments.dataset, share, seed, method, fold)


def work(runs: Sequence[Run], arguments: argparse.Namespace, more: Sequence[str]) -> None:
    """Train and test what is not finished, while there is time to begin."""
    missing = []
    for run in runs:
        prior = [f"--model.init_args.prior={arguments.prior}"] if run.method == OTHER else []
        words = run.fit_words(arguments.cache, arguments.round0_steps, [*more, *prior])
        if run.finished:
            refuse_another_setup(["fit", *words])
        else:
            alone = run.method in (ROUND0, "inerrant0", "naive")
            missing.append(Training(run.folder, words, None if alone else run.folder.parent / ROUND0))
    train(missing, arguments.minutes, arguments.jobs, lambda: refuse_unequal_runs(runs))


def refuse_unequal_runs(runs: Sequence[Run]) -> None:
    """Refuse what is finished of a share, whatever the methods of this call, if it cannot be compared."""
    for run in {run.folder.parent: run for run in runs}.values():
        beside = [replace(run, method=method) for method in (ROUND0, *METHODS)]
        refuse_unequal_methods([one.folder for one in beside if one.finished], run.folder.parent / ROUND0)
    for run in {(run.share, run.method): run for run in runs}.values():
        others = dict.fromkeys((one.seed, one.fold) for one in runs)
        same = [replace(run, seed=seed, fold=fold) for seed, fold in others]
        # COARSE is where the coarse model lies; its setup is compared with the others'.
        but = ("seed", "data.seed", "data.fold", DATA, COARSE)
        refuse_unequal([one.folder for one in same if one.finished], but)


def rows_of(path: Path) -> list[dict[str, str]]:
    """A table's lines."""
    with path.open() as file:
        return list(csv.DictReader(file))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation (ddof 1), of shares in per cent."""
    deviation = f" ({100 * statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def kept(path: Path, finished: Sequence[Run]) -> list[dict[str, str]]:
    """The lines of a table of ours about other runs than these."""
    ours = {tuple(run.line.values()) for run in finished}
    return [line for line in known_lines(path) if tuple(line[key] for key in KEYS) not in ours]


def known_lines(path: Path) -> list[dict[str, str]]:
    """The lines of a table, if there is one.

    Raises:
        IntegrityError: If it is of a version with other columns or methods.
    """
    lines = rows_of(path) if path.exists() else []
    lacking = sorted({key for key in KEYS for line in lines if key not in line})
    unknown = sorted({line["method"] for line in lines if not lacking} - {ROUND0, *METHODS})
    if lacking or unknown:
        raise IntegrityError(
            f"{path}: of another version: lacks the columns {lacking}, has the methods {unknown}; move it away"
        )
    return lines


def sorted_lines(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """By data set, share, method, precision, fold and seed; organs stay in their order."""
    methods = [ROUND0, *METHODS]

    def place(line: dict[str, str]) -> tuple[str, int, int, str, int, int]:
        share, fold, seed = int(line["label_share_percent"]), int(line["fold"]), int(line["seed"])
        return line["dataset"], -share, methods.index(line["method"]), line["computed_in"], fold, seed

    return sorted(lines, key=place)


def scores_of(run: Run) -> Iterator[dict[str, str]]:
    """The lines of a tested run, one an organ, and their means."""
    test, means = run.folder / "test", defaultdict[str, list[float]](list)
    outcomes: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for case in read_case_table(test / "cases.csv"):
        outcomes[case.organ].append((case.score.outcome, case.score.dsc))
    for row in rows_of(test / "summary.csv"):
        found = outcomes[row["organ"]]
        there = [dsc for outcome, dsc in found if outcome in ("found", "missed")]
        present = statistics.fmean(there) if there else None
        if row["organ"] == OVERALL:
            present = statistics.fmean(means["present"]) if means["present"] else None
        elif present is not None:
            means["present"].append(present)
        yield {
            **run.line,
            "organ": row["organ"],
            "dsc_mean": f"{float(row['dsc_mean']):.4f}",
            "dsc_present": "" if present is None else f"{present:.4f}",
            "absent_cases": f"{sum(outcome in ('both_empty', 'false_positive') for outcome, _ in found)}",
            "false_positives": f"{sum(outcome == 'false_positive' for outcome, _ in found)}",
        }


SCORES = {
    "dsc_mean": "DSC, the mean over all cases that annotate an organ: 1 or 0 where it is rightly or wrongly not there.",
    "dsc_present": "DSC, the mean over the cases that have the organ.",
}


def show_scores(runs: Sequence[Run], tables: Path) -> None:
    """DSC of each method and organ; std over folds and seeds."""
    finished = [run for run in runs if run.finished]
    lines = kept(tables / "results.csv", finished)
    lines += [line for run in finished for line in scores_of(run)]
    if not lines:
        return
    lines = sorted_lines(lines)
    write(tables / "results.csv", lines)
    organs = list(dict.fromkeys(line["organ"] for line in lines))
    for column, title in SCORES.items():
        found: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for line in lines:
            of = (line["dataset"], line["label_share_percent"], line["method"], line["computed_in"])
            if line[column]:
                found[of][line["organ"]].append(float(line[column]))
        print(f"\n{title}\n| data | labels | method | computed in | runs | {' | '.join(organs)} |")
        print("|---|---|---|---|---:|" + "---:|" * len(organs))
        for (dataset, share, method, precision), scores in found.items():
            cells = (spread(scores[organ]) if scores[organ] else "" for organ in organs)
            runs_of = max(map(len, scores.values()))
            print(f"| {dataset} | {share}% | {method} | {precision} | {runs_of} | " + " | ".join(cells) + " |")


def keep_cases(runs: Sequence[Run], tables: Path) -> None:
    """DSC of each case and organ, from which the tests can be computed again when the runs are gone."""
    finished = [run for run in runs if run.finished]
    lines = kept(tables / "cases.csv", finished)
    for run in finished:
        for row in read_case_table(run.folder / "test" / "cases.csv"):
            outcome, dsc = row.score.outcome, row.score.dsc
            if outcome != "unknown":
                lines.append(
                    {**run.line, "case": row.case, "organ": row.organ, "outcome": outcome, "dsc": f"{dsc:.4f}"}
                )
    if lines:
        write(tables / "cases.csv", sorted_lines(lines))


RATES = ("precision", "recall", "probability_auc", "score_auc", "probability_ap_success", "score_ap_success",
         "probability_ap_error", "score_ap_error")  # fmt: skip


def show_rounds(runs: Sequence[Run], tables: Path) -> None:
    """What each round added, as means over organs, then mean and std over folds and seeds."""
    added: dict[tuple[str, ...], list[int]] = defaultdict(list)
    found: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    lines = kept(tables / "rounds.csv", [run for run in runs if run.finished])
    for run in runs:
        for table in sorted(run.folder.glob("*_relabel/organs.csv")) if run.finished else []:
            round_name = table.parent.name.split("_")[1].removeprefix("round")
            for row in rows_of(table):
                shown = {rate: row[rate] and f"{float(row[rate]):.4f}" for rate in RATES}
                counts = {name: row[name] for name in ("organ", "candidates", "added")}
                lines.append({**run.line, "round": round_name, **counts, **shown})
    if not lines:
        return
    lines = sorted_lines(lines)
    write(tables / "rounds.csv", lines)
    repeats: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for line in lines:
        of = tuple(
            line[key] for key in ("dataset", "label_share_percent", "method", "computed_in", "round", "fold", "seed")
        )
        repeats[of].append(line)
    for (*run_round, _, _), rows in repeats.items():
        added[tuple(run_round)].append(sum(int(row["added"]) > 0 for row in rows))
        for rate in RATES:
            values = [float(row[rate]) for row in rows if row[rate]]
            if values:
                found[tuple(run_round)][rate].append(statistics.fmean(values))
    print(
        "\nMeans over organs: precision of those of which something was added. AUC and AP over the candidates, of the\n"
        "probability and "
        "of the method's own score: in smile raw, over p >= 0.5 (that is MCP); averaged, and from its threshold on,\n"
        "where a method has a selection."
    )
    head = "| data | labels | method | computed in | round | organs | "
    print(head + " | ".join(RATES) + " |\n|---|---|---|---|---:|---:|" + "---:|" * len(RATES))
    for (dataset, share, method, computed_in, round_name), rates in found.items():
        cells = (spread(rates[rate]) if rates[rate] else "" for rate in RATES)
        organs = ", ".join(map(str, added[dataset, share, method, computed_in, round_name]))
        print(
            f"| {dataset} | {share}% | {method} | {computed_in} | {round_name} | {organs} | " + " | ".join(cells) + " |"
        )


def write(path: Path, lines: Sequence[Mapping[str, str | float]]) -> None:
    """A CSV file, whole or not at all; a line that lacks a column, as of other organs, has nothing there."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    publish_text(path, text.getvalue())


def main() -> None:
    """Train what is missing, then show the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/relabelling"))
    parser.add_argument("--dataset", default="btcv", help="prefix of the experiments' configs")
    parser.add_argument("--shares", type=int, nargs="+", default=[30, 10], help="per cent of the labels")
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["inerrant", "inerrant0", "smile", "pseudo_labels", "naive"]
    )
    parser.add_argument("--prior", type=Path, help="checkpoint of the run whose priors stipple0_other takes")
    parser.add_argument("--round0-steps", type=int, default=1500)
    parser.add_argument("--tables", type=Path, help="folder of results.csv and rounds.csv; default: OUT")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this; 0: tables only")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, for a GPU that one does not fill")
    arguments, more = parser.parse_known_args()
    if OTHER in arguments.methods and arguments.minutes > 0 and not (arguments.prior and arguments.prior.is_file()):
        parser.error(f"--methods {OTHER}: needs --prior CKPT, of a run with priors; found {arguments.prior}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    tables = arguments.tables or arguments.out
    runs = list(plan(arguments))
    try:
        for table in ("results.csv", "rounds.csv", "cases.csv"):
            known_lines(tables / table)
        refuse_unequal_runs(runs)
        if arguments.minutes > 0:
            work(runs, arguments, more)
    except OrgansegError as error:
        parser.exit(error.exit_code, f"relabelling: {error}\n")
    tables.mkdir(parents=True, exist_ok=True)
    show_scores(runs, tables)
    show_rounds(runs, tables)
    keep_cases(runs, tables)
    for share in arguments.shares:
        scores: Scores = defaultdict(dict)
        for run in runs:
            if run.share == share and run.finished and run.method != ROUND0:  # which had fewer steps
                scores[run.method][run.fold, run.seed] = dsc_of(run.folder)
        for first in ("inerrant0", "inerrant", "plain0", "plain"):
            if first in scores and len(scores) > 1:
                print(f"\nAt {share}% of the labels:")
                show_tests({first: scores[first], **scores})


if __name__ == "__main__":
    main()
