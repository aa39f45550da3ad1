"""What a second run does otherwise on the test patients of both: the slices where it recovers and removes most.

For each organ that is named: the axial slice in which most of the organ's voxels are found that the first run missed,
and the one in which most false ones are gone that it had (thesis, Figure 4.4). Prints the voxels won and lost of all
test patients. Usage: python tools/before_after.py RUN_BEFORE RUN_AFTER --organs pancreas stomach --out picture.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from organseg.report import case_file, read_config
from organseg.report.figures import colour_of, new_figure, png, shown
from organseg.report.overlays import fill, outline, paint, scale_bar
from organseg.report.views import ScoredCase, Slice, load_case, resampled_plane

MARGIN_MM = 60.0


def changes(before: ScoredCase, after: ScoredCase, channel: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each slice: voxels of the organ recovered (less those lost), and false ones removed (less those invented)."""
    value, truth = channel + 1, before.label == channel + 1
    one, two = before.preds == value, after.preds == value
    recovered = ((two & truth).sum(axis=(1, 2)) - (one & truth).sum(axis=(1, 2))).astype(np.int64)
    removed = ((one & ~truth).sum(axis=(1, 2)) - (two & ~truth).sum(axis=(1, 2))).astype(np.int64)
    return recovered, removed


def draw(pairs: Sequence[tuple[ScoredCase, ScoredCase, int, int, str]], organs: Sequence[str]) -> Figure:
    """A row each: the label, before, after; (before, after, channel, z, what it shows)."""
    figure = new_figure(12, 4.1 * len(pairs))
    grid = figure.subplots(len(pairs), 3, squeeze=False)
    for line, (before, after, channel, z, what) in zip(grid, pairs, strict=True):
        plane = resampled_plane(before.image, before.label.shape, 0, z)
        view = Slice(what, "A", plane, before.spacing[1:])
        colour = colour_of(organs[channel])
        masks = [volume[z] == channel + 1 for volume in (before.label, before.preds, after.preds)]
        rows, columns = np.nonzero(masks[0] | masks[1] | masks[2])
        (down, across), (height, width) = view.pixel_mm, plane.shape
        for axes, mask, title in zip(line, masks, ("label", "before", "after"), strict=True):
            paint(axes, view, before.window, fill(mask.astype(np.uint8), np.array([colour])))
            outline(axes, masks[0], view.pixel_mm, (1.0, 1.0, 1.0), 0.8)
            left, right = columns.min() * across - MARGIN_MM, (columns.max() + 1) * across + MARGIN_MM
            top, bottom = rows.min() * down - MARGIN_MM, (rows.max() + 1) * down + MARGIN_MM
            axes.set_xlim(max(0, left), min(width * across, right))
            axes.set_ylim(min(height * down, bottom), max(0, top))
            axes.set_title(title, fontsize=10)
        line[0].set_ylabel("\n".join(map(shown, what.splitlines())), fontsize=9)
        scale_bar(line[0])
    return figure


def main() -> None:
    """Print what changed, and draw where most of it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    parser.add_argument("--organs", nargs="+", default=["pancreas"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    config = read_config(arguments.runs[0])
    folder = arguments.runs[0] / "test" / "predictions"
    organs = list(json.loads((folder / "labels.json").read_text()).values())
    best: dict[tuple[str, str], tuple[int, tuple[ScoredCase, ScoredCase, int, int, str]]] = {}
    won: dict[str, NDArray[np.int64]] = {organ: np.zeros(2, dtype=np.int64) for organ in arguments.organs}
    for path in sorted(folder.rglob("*.nii.gz")):
        key = f"{path.parent.name}/{path.name.removesuffix('.nii.gz')}"
        before, after = (load_case(case_file(run, config, key), run / path.relative_to(arguments.runs[0]), organs)
                         for run in arguments.runs)  # fmt: skip
        for organ in arguments.organs:
            channel = organs.index(organ)
            for kind, per_slice in zip(("recovered", "removed"), changes(before, after, channel), strict=True):
                won[organ][int(kind == "removed")] += per_slice.sum()
                z = int(per_slice.argmax())
                what = f"{organ}, {key}, z = {z}\n{per_slice[z]} voxels {kind}"
                found = (int(per_slice[z]), (before, after, channel, z, what))
                best[organ, kind] = max(best.get((organ, kind), found), found, key=lambda one: one[0])
    for organ, (recovered, removed) in won.items():
        print(f"{organ}: {recovered:+d} voxels found that are right, {removed:+d} false ones less")
    pairs = [pair for voxels, pair in best.values() if voxels > 0]
    if not pairs:
        print("no slice is better: no picture")
        return
    arguments.out.write_bytes(png(draw(pairs, organs)))
    print(arguments.out)


if __name__ == "__main__":
    main()
