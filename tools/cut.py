"""What methods predict of organs that a scan does not show: the test cases of finished runs, cut in three along z.

Each part is a scan of its own, with another extent than any that was trained with. Of each organ that none of its
slices shows, nor any within 15 mm of it, all that is predicted is invented; for organs that a part shows, whole or cut,
the DSC says whether they are found. A measure of what training has taught, not to choose settings by: it is made of the
test cases.

Usage: python tools/cut.py RUN [RUN ...] [--by-others] [--tables DIR]
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from relabelling import write
from stipple import with_trainer

from organseg.batch import WholeCase
from organseg.cli.training import quieten
from organseg.data import SliceDataModule
from organseg.data.module import WholeCases
from organseg.errors import OrgansegError
from organseg.methods import PriorModule
from organseg.methods.base import SegmentationModule

PARTS = ("lower", "middle", "upper")
MARGIN_MM = 15.0


def parts_of(case: WholeCase) -> Iterator[tuple[WholeCase, frozenset[int]]]:
    """Thirds of a case, and the labels that are in each or within the margin of it."""
    assert case.truth is not None
    edges = np.linspace(0, len(case.truth), len(PARTS) + 1).round().astype(int)
    margin = int(np.ceil(MARGIN_MM / case.spacing[0]))
    for name, start, end in zip(PARTS, edges[:-1], edges[1:], strict=True):
        if start == end:  # fewer slices than parts
            continue
        truth = case.truth[start:end]
        near = case.truth[max(0, start - margin) : end + margin]
        part = replace(case, key=f"{case.key}/{name}", image=case.image[start:end], truth=truth, shape=truth.shape)
        yield part, frozenset(map(int, np.unique(near)))


def measured(run: Path, by_others: bool) -> Iterator[list[dict[str, str]]]:
    """A line for each part of a test case and organ that it is known to show or not to, of each way to segment."""
    data, module = with_trainer(run)
    yield lines_of(run.name, data, module)
    if by_others and isinstance(module, PriorModule) and module.use and not module.placed_by_others:
        module.placed_by_others = True
        yield lines_of(f"{run.name}_by_others", data, module)


def lines_of(run: str, data: SliceDataModule, module: SegmentationModule) -> list[dict[str, str]]:
    """Of one of them."""
    cases, lines = WholeCases(data.cohort.test, data.preprocessing, on_source_grid=False), []
    for number in range(len(cases)):
        case = cases[number]
        assert case is not None
        for part, near in parts_of(case):
            preds, voxel_ml = module.segment(part), float(np.prod(part.spacing)) / 1000
            for channel in map(int, np.flatnonzero(part.annotated)):
                found, there = preds == channel + 1, np.asarray(part.truth == channel + 1)
                if not there.any() and channel + 1 in near:
                    continue
                dsc = f"{2 * (found & there).sum() / (found.sum() + there.sum()):.4f}" if there.any() else ""
                lines.append({"run": run, "part": part.key, "organ": data.organs[channel], "dsc": dsc,
                              "invented_ml": "" if there.any() else f"{found.sum() * voxel_ml:.2f}"})  # fmt: skip
    return lines


def main() -> None:
    """Measure, and show the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--by-others", action="store_true", help="with priors: once more with `placed_by_others`")
    parser.add_argument("--tables", type=Path, help="folder for `cut.csv`")
    arguments = parser.parse_args()
    quieten()
    print("Organs that a third of a scan shows, and their DSC %; organs that it does not show, how many of them are")
    print("predicted all the same (more than 1 mL), how much a third, and the most of one")
    print("| run | shown | DSC % | not shown | predicted | mL a third | the most, mL |\n|---|" + "---:|" * 6)
    lines = []
    try:
        for ours in chain.from_iterable(measured(run, arguments.by_others) for run in arguments.runs):
            shown = [100 * float(line["dsc"]) for line in ours if line["dsc"]] or [float("nan")]
            invented = [float(line["invented_ml"]) for line in ours if line["invented_ml"]]
            some = sum(volume > 1 for volume in invented)
            each = sum(invented) / len({line["part"] for line in ours})
            print(f"| {ours[0]['run']} | {len(shown)} | {statistics.fmean(shown):.1f} | {len(invented)} | {some} "
                  f"| {each:.1f} | {max(invented, default=0.0):.1f} |", flush=True)  # fmt: skip
            lines += ours
    except OrgansegError as error:
        parser.exit(error.exit_code, f"cut: {error}\n")
    if arguments.tables:
        arguments.tables.mkdir(parents=True, exist_ok=True)
        write(arguments.tables / "cut.csv", lines)


if __name__ == "__main__":
    main()
