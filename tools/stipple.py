"""What STIPPLE's parts do (METHOD.md 2.5): bins, positions, and false positives far from the organ.

Goes on from the runs of tools/relabelling.py (`--methods inerrant0 plain0 stipple0`, the same --out, share, seed and
fold): trains STIPPLE without relabelling with other options (`--variants`), `boxes` as the thesis has it (organs
centred in their bounding boxes, found by alignment, no blur); tests the latter with organs at their naive and true
positions, and ours with true ones, or with organs that are not found placed by the others; and shows, beside the DSC,
how far the positions are off and how much is predicted far from the organ. What is finished is skipped, what cannot be
compared is refused. Tables also go to `positions.csv` and `variants.csv` in `--tables`.

Usage: python tools/stipple.py --cache cache --out runs/relabelling --share 30 --seed 0 --minutes 60
Options that it does not know, as --option=value, go to every `fit`.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
from compared import is_finished, refuse_another_setup, refuse_unequal
from numpy.typing import NDArray
from relabelling import KEYS, ROUND0, Run, rows_of, write
from scipy import ndimage
from trained import organseg

from organseg.cli.modules import load_module
from organseg.cli.tested import is_tested
from organseg.cli.training import quieten
from organseg.data import SliceDataModule
from organseg.errors import OrgansegError, UsageError
from organseg.methods import PriorModule
from organseg.methods.base import SegmentationModule
from organseg.runtime.precision import affordable_precision
from organseg.strict_yaml import read_yaml
from organseg.volumes import read_label

FAR_MM = 20.0
BOXES = "stipple0_boxes"
THESIS = {"centring": "boxes", "position": "aligned", "smooth_mm": "0.0"}
FOUND = {BOXES: ("naive", "aligned"), "stipple0": ("matched",)}
"""Where each of the two takes the organs of a test case to be, against its own notion of a true centre."""
POSITION = "--model.init_args.position"
TESTS = {
    f"{BOXES}_naive": (BOXES, POSITION, "naive"),
    f"{BOXES}_true": (BOXES, POSITION, "true"),
    "stipple0_true": ("stipple0", POSITION, "true"),
    "stipple0_by_others": ("stipple0", "--model.init_args.placed_by_others", "true"),
}
"""Tests of a trained run whose test cases' organs are taken to be elsewhere."""


def variant(text: str) -> tuple[str, dict[str, str]]:
    """working_spacing=[4,4,4] -> the run's name, stipple0_working_spacing_4x4x4, and the option with its value."""
    if text == "boxes":
        return BOXES, THESIS
    option, _, value = text.partition("=")
    if not option or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is neither OPTION=VALUE, for example bins=1, nor boxes")
    return f"stipple0_{option}_{value.strip('[]').replace(',', 'x')}", {option: value}


def work(base: Run, arguments: argparse.Namespace, more: list[str]) -> None:
    """Train and test what is not finished, while there is time to begin."""
    end = time.monotonic() + 60 * arguments.minutes
    for name, options in arguments.variants:
        run = base.folder.with_name(name)
        words = base.fit_words(arguments.cache, 0, more)
        words[words.index("--out") + 1] = str(run)
        words += [f"--model.init_args.{option}={value}" for option, value in options.items()]
        if is_finished(run):
            refuse_another_setup(["fit", *words])
        elif time.monotonic() < end:
            organseg("fit", *words)
            last = run / "checkpoints" / "last.ckpt"
            organseg("test", "--config", f"{run / 'config.yaml'}", "--ckpt_path", f"{last}")
        refuse_unequal([base.folder, run], [f"model.init_args.{option}" for option in options])
    for name, (of, *words) in TESTS.items():
        trained = base.folder.with_name(of)
        run, last = base.folder.with_name(name), trained / "checkpoints" / "last.ckpt"
        if not is_finished(trained) or is_tested(last, run / "test") or time.monotonic() > end:
            continue
        organseg("test", "--config", f"{trained / 'config.yaml'}", "--ckpt_path", f"{last}", "--out", f"{run}", *words)


def far_ml(
    preds: NDArray[np.uint8], truth: NDArray[np.uint8], spacing: tuple[float, ...], known: NDArray[np.bool_]
) -> list[float]:
    """Volume of each known organ that is predicted farther than `FAR_MM` from it; of an absent organ all of it."""
    voxel_ml = float(np.prod(spacing)) / 1000
    volumes = []
    for k in np.flatnonzero(known) + 1:
        found, there = preds == k, truth == k
        if there.any() and found.any():
            boxes = ndimage.find_objects((found | there).astype(np.uint8))[0]
            away = ndimage.distance_transform_edt(~there[boxes], sampling=spacing)
            found = found[boxes] & (away > FAR_MM)
        volumes.append(float(found.sum()) * voxel_ml)
    return volumes


def far_of(run: Path, config_of: Path) -> dict[str, float]:
    """Organ -> mean over the test cases that know it of the volume (mL) predicted far from it."""
    data = SliceDataModule(**options_of(config_of))  # type: ignore[arg-type]
    volumes: dict[str, list[float]] = {organ: [] for organ in data.organs}
    for case in data.cohort.test:
        truth = case.lookup[case.cached.source_label()]
        preds = read_label(run / "test" / "predictions" / f"{case.key}.nii.gz", case=case.key)[0].array
        known = [organ for organ, there in zip(data.organs, case.known, strict=True) if there]
        far = far_ml(preds, truth, case.cached.header.source_spacing, case.known)
        for organ, volume in zip(known, far, strict=True):
            volumes[organ].append(volume)
    return {organ: statistics.fmean(found) for organ, found in volumes.items() if found}


def options_of(run: Path) -> dict[str, object]:
    """What the run's data module was made of.

    Raises:
        UsageError: If it is none of slices.
    """
    config = read_yaml(run / "config.yaml")
    kind = config["data"]["class_path"].rpartition(".")[2]
    if kind != "SliceDataModule":
        raise UsageError(f"{run}: trained on what {kind} gives; this tool reads runs of SliceDataModule alone")
    options = {key: value for key, value in config["data"]["init_args"].items() if key != "augmentation"}
    return {**options, "window_hu": tuple(options["window_hu"]), "seed": config["seed"]}


def with_trainer(run: Path) -> tuple[SliceDataModule, SegmentationModule]:
    """A run's data module, and its model, which segments whole cases in the run's precision if this CPU can."""
    data = SliceDataModule(**options_of(run))  # type: ignore[arg-type]
    module = load_module(run / "checkpoints" / "last.ckpt")
    precision = affordable_precision(read_yaml(run / "config.yaml")["trainer"]["precision"], "cpu")
    module.trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
                               enable_progress_bar=False)  # fmt: skip
    return data, module


def position_errors(run: Path, positions: Sequence[str]) -> list[dict[str, str]]:
    """Mm between where the test cases' organs are found and where they are."""
    data, module = with_trainer(run)
    assert isinstance(module, PriorModule)
    module.placed_by_others = False
    data.cohort = replace(data.cohort, train=data.cohort.test)
    cases, lines = data.training_cases(), []
    for number in range(len(cases)):
        case = cases[number]
        assert case is not None and module.known is not None
        truth = module.positioning.annotated(case, module.known)
        for position in positions:
            module.position = position  # type: ignore[assignment]
            module.forget_positions()
            found = module.centres_of(case)
            for organ, here, there in zip(data.organs, found, truth, strict=True):
                if not np.isnan(there).any():
                    off = "" if np.isnan(here).any() else f"{float(np.linalg.norm(here - there)):.1f}"
                    lines.append({"case": case.key, "organ": organ, "position": position, "off_mm": off})
    return lines


def show_positions(lines: list[dict[str, str]]) -> None:
    """Median distance of each organ."""
    print(
        "\nMedian distance (mm) of the found centre from the true one, and cases in which it was not found: naive and"
    )
    print("aligned from the middle of the true bounding box, matched from where the prior fits the truth best")
    shown = list(dict.fromkeys(line["position"] for line in lines))
    print(f"| organ | {' | '.join(shown)} | not found |\n|---|" + "---:|" * (len(shown) + 1))
    for organ in dict.fromkeys(line["organ"] for line in lines):
        cells, missed = [], 0
        for position in shown:
            ours = [line["off_mm"] for line in lines if (line["organ"], line["position"]) == (organ, position)]
            missed = ours.count("")
            known = [float(off) for off in ours if off]
            cells.append(f"{statistics.median(known):.1f}" if known else "")
        print(f"| {organ} | {' | '.join(cells)} | {missed} of {len(ours)} |")


def put(table: Path, lines: Sequence[dict[str, str]]) -> None:
    """Write lines beside those that a table has of other data, shares, seeds and variants."""
    ours = {tuple(line[key] for key in KEYS) for line in lines}
    there = rows_of(table) if table.exists() else []
    write(table, [*(line for line in there if tuple(line[key] for key in KEYS) not in ours), *lines])


def main() -> None:
    """Run what is missing, then show the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/relabelling"))
    parser.add_argument("--dataset", default="btcv", help="prefix of the experiments' configs")
    parser.add_argument("--share", type=int, default=30, help="per cent of the labels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--variants", nargs="*", type=variant, metavar="OPTION=VALUE",
                        default=[variant(text) for text in ("boxes", "bins=1", "bins=all", "cross_fitted=true")],
                        help="of model.init_args, each a training; `boxes`: the thesis's priors; "
                             "default: boxes bins=1 bins=all cross_fitted=true")  # fmt: skip
    parser.add_argument("--tables", type=Path, help="folder of the tables; default: OUT")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this; 0: tables only")
    arguments, more = parser.parse_known_args()
    quieten()
    base = Run(arguments.out, arguments.dataset, arguments.share, arguments.seed, "stipple0", arguments.fold)
    try:
        work(base, arguments, more)
    except OrgansegError as error:
        parser.exit(error.exit_code, f"stipple: {error}\n")
    tables = arguments.tables or arguments.out
    tables.mkdir(parents=True, exist_ok=True)
    variants = [ROUND0, "inerrant0", "inerrant", "plain0", "plain", "stipple0", "stipple",
                *(name for name, _ in arguments.variants), *TESTS]  # fmt: skip
    lines, trained = [], {name: of for name, (of, *_) in TESTS.items()}
    for name in variants:
        run, of = base.folder.with_name(name), base.folder.with_name(trained.get(name, name))
        if is_finished(of) and is_tested(of / "checkpoints" / "last.ckpt", run / "test"):
            scores = {row["organ"]: row["dsc_mean"] for row in rows_of(run / "test" / "summary.csv")}
            far = far_of(run, run if (run / "config.yaml").exists() else base.folder)  # those of TESTS have none
            volumes = {f"far_ml_{organ}": f"{volume:.3f}" for organ, volume in far.items()}
            lines.append({**base.line, "method": name, **scores, "far_ml": f"{sum(far.values()):.3f}", **volumes})
    if not lines:
        print("no run is finished")
        return
    organs = [name for name in lines[0] if name not in base.line and not name.startswith("far_ml")]
    print("\nDSC, and mL predicted farther than 20 mm from the organ: the sum of all organs, and of the pancreas")
    print(f"| variant | {' | '.join(organs)} | far | pancreas |\n|---|" + "---:|" * (len(organs) + 2))
    for line in lines:
        print(f"| {line['method']} | " + " | ".join(f"{100 * float(line[organ]):.1f}" for organ in organs)
              + f" | {float(line['far_ml']):.1f} | {float(line.get('far_ml_pancreas', 'nan')):.1f} |")  # fmt: skip
    put(tables / "variants.csv", lines)
    errors = []
    for name, positions in FOUND.items():
        run = base.folder.with_name(name)
        if is_finished(run) and arguments.minutes > 0:
            errors += [{**base.line, "method": name, **line} for line in position_errors(run, positions)]
    if errors:
        show_positions(errors)
        put(tables / "positions.csv", errors)


if __name__ == "__main__":
    main()
