"""Overlays: image, label and prediction of a case side by side, organs in the colours of the anatomy.

`paint`, `outline` and `scale_bar` draw a slice for the other pictures of the report too.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from organseg.batch import IGNORE
from organseg.metrics import CaseRow
from organseg.report.figures import colour_of, new_figure, organ_title, shown
from organseg.report.views import ScoredCase, Slice, View, content_box, views_of

_WIDTH, _SIDE, _FILL = 12.0, 0.85, 0.45
_PADDING_MM = 10.0
_IGNORED = (0.55, 0.55, 0.55)
_OUTLINE = [withStroke(linewidth=2, foreground="black")]
_EMPTY = {"missed": ", missed", "false_positive": ", false positive", "both_empty": ", rightly absent"}
_BELOW = {"A": "P", "H": "F"}


def draw_overlay(case: ScoredCase, role: str, rows: Sequence[CaseRow]) -> Figure:
    """A row for each view, with the columns image, label, prediction; all at one scale.

    Args:
        case: The case.
        role: `best`, `median` or `worst`.
        rows: The case's rows of the table, in channel order.
    """
    views = views_of(case)
    crops = [crop(view, case.window) for view in views]
    # All rows show the same columns: what is above each other lies at the same place in the patient.
    left, right = min(crop[2] for crop in crops), max(crop[3] for crop in crops)
    heights = [bottom - top for top, bottom, *_ in crops]
    panel = (_WIDTH - _SIDE) / 3
    handles = _legend(case, rows)
    columns = 4 if max(len(str(handle.get_label())) for handle in handles) < 32 else 3
    legend = 0.5 + 0.2 * -(-len(handles) // columns)
    figure = new_figure(_WIDTH, sum(heights) * panel / (right - left) + 0.6 + legend)
    grid = figure.subplots(len(views), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, view, (top, bottom, *_) in zip(grid, views, crops, strict=True):
        _draw_view(line, view, case.window, [row.organ for row in rows])
        for axes in line:
            axes.set_xlim(left, right)
            axes.set_ylim(bottom, top)
        line[0].set_ylabel(view.caption, fontsize=9)
        scale_bar(line[0])
    for axes, title in zip(grid[0], ("image", "label", "prediction (white: outline of the label)"), strict=True):
        axes.set_title(title, fontsize=10)
    known = [row.score.dsc for row in rows if row.score.outcome != "unknown"]
    figure.suptitle(f"{role} case: {shown(case.key)}, mean DSC {100 * np.mean(known):.1f} %", fontsize=13)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    return figure


def crop(view: View, window: tuple[float, float]) -> tuple[float, float, float, float]:
    """(top, bottom, left, right) in mm: the content and a little around it, within the picture."""
    (down, across), (height, width) = view.pixel_mm, view.image.shape
    rows, columns = content_box(view, window)
    return (
        max(0.0, rows.start * down - _PADDING_MM),
        min(height * down, rows.stop * down + _PADDING_MM),
        max(0.0, columns.start * across - _PADDING_MM),
        min(width * across, columns.stop * across + _PADDING_MM),
    )


def _draw_view(line: Sequence[Axes], view: View, window: tuple[float, float], organs: Sequence[str]) -> None:
    """One slice three times."""
    colours = np.array([colour_of(organ) for organ in organs])
    for axes, values in zip(line, (None, view.label, view.preds), strict=True):
        paint(axes, view, window, None if values is None else fill(values, colours))
        if values is not None:
            for value in np.unique(values[(values > 0) & (values != IGNORE)]):
                outline(axes, values == value, view.pixel_mm, colours[value - 1], 1.0)
    truth = (view.label > 0) & (view.label != IGNORE)
    for value in np.unique(view.label[truth]):
        outline(line[2], view.label == value, view.pixel_mm, (1.0, 1.0, 1.0), 0.7)


def paint(axes: Axes, view: Slice, window: tuple[float, float], layer: NDArray[np.float64] | None) -> None:
    """A slice in grey, and colours over it; coordinates are mm from the slice's upper left corner.

    Args:
        axes: Where to.
        view: The slice.
        window: Intensities to show as black and white.
        layer: [H, W, 4] RGBA, or nothing.
    """
    (down, across), (height, width) = view.pixel_mm, view.image.shape
    extent = (0.0, width * across, height * down, 0.0)
    axes.set_facecolor("black")
    axes.imshow(view.image, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="bilinear")
    if layer is not None:
        axes.imshow(layer, extent=extent, interpolation="nearest")
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    _letters(axes, view.top)


def _letters(axes: Axes, top: str) -> None:
    """The patient's right and left, and where up and down are."""
    places = (("R", 0.02, 0.5, "left", "center"), ("L", 0.98, 0.5, "right", "center"),
              (top, 0.5, 0.98, "center", "top"), (_BELOW[top], 0.5, 0.02, "center", "bottom"))  # fmt: skip
    for letter, x, y, across, down in places:
        axes.text(
            x, y, letter, ha=across, va=down, transform=axes.transAxes, color="white", fontsize=9, path_effects=_OUTLINE
        )


def fill(values: NDArray[np.uint8], colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Translucent colours: [H, W] values -> [H, W, 4]; background is clear, ignored voxels are grey."""
    table = np.zeros((256, 4))
    table[1 : len(colours) + 1, :3] = colours
    table[1 : len(colours) + 1, 3] = _FILL
    table[IGNORE] = (*_IGNORED, _FILL)
    filled: NDArray[np.float64] = table[values]
    return filled


def outline(
    axes: Axes, mask: NDArray[np.bool_], pixel_mm: tuple[float, float], colour: Sequence[float], width: float
) -> None:
    """The mask's border; padded, so that it closes also at the picture's edge."""
    padded = np.pad(mask, 1).astype(np.float32)
    down, across = ((np.arange(n) - 0.5) * mm for n, mm in zip(padded.shape, pixel_mm, strict=True))
    axes.contour(across, down, padded, levels=[0.5], colors=[tuple(colour)], linewidths=width)


def scale_bar(axes: Axes) -> None:
    """5 cm, in the lower left corner."""
    left, bottom = axes.get_xlim()[0] + 8, axes.get_ylim()[0] - 8
    axes.plot([left, left + 50], [bottom, bottom], color="white", linewidth=2, path_effects=_OUTLINE)
    axes.text(left + 25, bottom - 4, "5 cm", color="white", fontsize=8, ha="center", va="bottom", path_effects=_OUTLINE)


def _legend(case: ScoredCase, rows: Sequence[CaseRow]) -> list[Patch]:
    """Colour, name and DSC of each organ."""
    patches = []
    for row in rows:
        outcome = row.score.outcome
        result = "not annotated" if outcome == "unknown" else f"{100 * row.score.dsc:.1f} %{_EMPTY.get(outcome, '')}"
        patches.append(Patch(color=colour_of(row.organ), label=f"{organ_title(row.organ)}  {result}"))
    if (case.label == IGNORE).any():
        patches.append(Patch(color=_IGNORED, label="ignored (truth unknown)"))
    return patches
