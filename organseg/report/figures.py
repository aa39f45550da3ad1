"""Curves of the training and box plots of the test, as matplotlib figures (DESIGN.md 4: `report`).

Figures are built with matplotlib's objects, never pyplot: nothing stays between two reports, and no display is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from organseg import anatomy
from organseg.metrics import CaseRow

Curves = Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]]
"""Metric -> its steps, rising, and its values there, all finite."""

_BLUE, _GREY, _ORANGE = "#1f5f99", "#666666", "#c9661b"
_MARKERS = {
    "found": ("o", "case (organ found)"),
    "missed": ("X", "missed: not predicted at all"),
    "false_positive": ("^", "false positive: predicted, absent"),
    "both_empty": ("s", "both empty: rightly not predicted"),
}
_MARKER_SIZE, _GOLDEN = 22, 0.618034


def new_figure(width: float, height: float) -> Figure:
    """An empty figure on an Agg canvas; inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    stream = BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def colour_of(organ: str) -> tuple[float, float, float]:
    """The organ's colour in pictures, 0..1."""
    red, green, blue = anatomy.colour_of(organ)
    return red / 255, green / 255, blue / 255


def shown(text: str) -> str:
    """Text from a file as matplotlib may draw it: `$` starts no formula, and no character lacks a glyph."""
    latin = text.encode("latin-1", "replace").decode("latin-1")
    return "".join(letter if letter.isprintable() else "?" for letter in latin).replace("$", r"\$")


def organ_title(organ: str) -> str:
    """`left_kidney` -> `left kidney`."""
    return shown(organ.replace("_", " "))


def draw_curves(curves: Curves) -> Figure | None:
    """Loss, validation DSC, learning rate and pace over the steps: one panel for each that was logged.

    Returns:
        None if none of them was.
    """
    rates = [name for name in curves if name in ("lr", "pace/lr") or name.startswith("lr-")]
    panels: list[Callable[[Axes], None]] = []
    if "train/loss" in curves:
        panels.append(lambda axes: _draw_loss(axes, *curves["train/loss"]))
    if any(name == "val/dsc" or name.startswith("val/dsc/") for name in curves):
        panels.append(lambda axes: _draw_validation(axes, curves))
    if rates:
        panels.append(lambda axes: _draw_rates(axes, {name: curves[name] for name in rates}))
    if "pace/samples_per_s" in curves:
        panels.append(lambda axes: _draw_pace(axes, curves))
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(6.0 * columns, 3.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes)
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(True, alpha=0.25)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over `window` neighbours (odd); towards both ends over fewer, as many on either side."""
    place = np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(place, place[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    mean: NDArray[np.float64] = (sums[place + half + 1] - sums[place - half]) / (2 * half + 1)
    return mean


def _draw_loss(axes: Axes, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    window = 2 * (len(values) // 40) + 1
    axes.plot(
        steps,
        values,
        color=_BLUE,
        alpha=0.35 if window > 1 else 1.0,
        linewidth=1,
        label="as logged",
        marker=_dot(steps),
    )
    if window > 1:
        axes.plot(steps, smoothed(values, window), color=_BLUE, linewidth=2, label=f"mean of {window} values")
        axes.legend(fontsize=8)
    axes.set_title("training loss", fontsize=10)


def _draw_validation(axes: Axes, curves: Curves) -> None:
    for name, (steps, values) in curves.items():
        if name.startswith("val/dsc/"):
            organ = name.removeprefix("val/dsc/")
            axes.plot(
                steps, values, color=colour_of(organ), linewidth=1.4, label=organ_title(organ), marker=_dot(steps)
            )
    if "val/dsc" in curves:
        steps, values = curves["val/dsc"]
        axes.plot(steps, values, color="black", linewidth=2.4, label="mean of organs", marker=_dot(steps))
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("validation DSC (on the working grid)", fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _draw_rates(axes: Axes, rates: Curves) -> None:
    for name, (steps, values) in rates.items():
        axes.plot(steps, values, linewidth=1.6, label=shown(name), marker=_dot(steps))
    if all((values > 0).all() for _, values in rates.values()):
        axes.set_yscale("log")
    axes.set_title("learning rate", fontsize=10)
    axes.legend(fontsize=8)


def _draw_pace(axes: Axes, curves: Curves) -> None:
    steps, values = curves["pace/samples_per_s"]
    axes.plot(steps, values, color=_BLUE, linewidth=1.4, marker=_dot(steps))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("slices or patches / s", color=_BLUE)
    axes.set_title("pace", fontsize=10)
    if "pace/data_wait" in curves:
        waits = axes.twinx()
        steps, values = curves["pace/data_wait"]
        waits.plot(steps, values, color=_ORANGE, linewidth=1.4, marker=_dot(steps))
        waits.set_ylim(0, 1)
        waits.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        waits.set_ylabel("time spent waiting for data", color=_ORANGE)


def _dot(steps: NDArray[np.int64]) -> str:
    """Marks on the values where they are few: a line through one value is invisible."""
    return "." if len(steps) <= 30 else ""


def draw_organs(rows: Sequence[CaseRow]) -> Figure | None:
    """A box of the DSC of each organ over its cases, and each case as a mark whose shape is its outcome.

    Returns:
        None if no organ was evaluated in any case.
    """
    known = [row for row in rows if row.score.outcome != "unknown"]
    organs = list(dict.fromkeys(row.organ for row in known))
    if not organs:
        return None
    figure = new_figure(10.5, 1.5 + 0.52 * len(organs))
    axes = figure.subplots()
    for height, organ in enumerate(organs):
        _draw_organ(axes, height, [row for row in known if row.organ == organ])
    axes.text(1.05, -0.62, "mean ± std", fontsize=9, color=_GREY)
    axes.set_yticks(range(len(organs)), [organ_title(organ) for organ in organs])
    axes.set_ylim(len(organs) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("DSC; box: quartiles, line: median, diamond: mean, whiskers: 1.5 interquartile ranges")
    axes.grid(True, axis="x", alpha=0.25)
    _explain_marks(figure, axes, {row.score.outcome for row in known})
    return figure


def _draw_organ(axes: Axes, height: int, rows: Sequence[CaseRow]) -> None:
    """One organ: box, marks, and in words what they average to."""
    values, colour = [row.score.dsc for row in rows], colour_of(rows[0].organ)
    box = axes.boxplot(
        [values], positions=[height], orientation="horizontal", widths=0.62, showfliers=False, showmeans=True,
        patch_artist=True, medianprops={"color": "black"}, zorder=1,
        meanprops={"marker": "D", "markersize": 7, "markerfacecolor": "none", "markeredgecolor": "black", "zorder": 4},
    )  # fmt: skip
    box["boxes"][0].set_facecolor((*colour, 0.35))
    for number, row in enumerate(rows):
        # The golden ratio spreads equal values over the box's height, the same way each time.
        offset = 0.44 * ((number * _GOLDEN) % 1 - 0.5)
        marker, _ = _MARKERS[row.score.outcome]
        axes.scatter(
            row.score.dsc, height + offset, s=_MARKER_SIZE, marker=marker, color=colour, edgecolors="black",
            linewidths=0.6, zorder=3, clip_on=False,
        )  # fmt: skip
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    axes.text(1.05, height, f"{100 * np.mean(values):.1f}{spread} %  (n = {len(values)})", va="center", fontsize=9)


def _explain_marks(figure: Figure, axes: Axes, outcomes: set[str]) -> None:
    """A legend of the outcomes that occur."""
    handles = [
        axes.scatter(
            [], [], s=_MARKER_SIZE, marker=marker, color=_GREY, edgecolors="black", linewidths=0.6, label=label
        )
        for outcome, (marker, label) in _MARKERS.items()
        if outcome in outcomes
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
