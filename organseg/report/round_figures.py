"""How slices of relabelled cases are drawn: rows of panels, right voxels in cyan, wrong ones in red, scores as maps.

The colours are those of the thesis's Figure 3.5: low scores red, high ones blue.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from organseg.report.figures import new_figure, shown
from organseg.report.overlays import outline, paint, scale_bar
from organseg.report.views import Slice

CYAN, RED, WHITE = (0.0, 1.0, 1.0), (1.0, 0.1, 0.1), (1.0, 1.0, 1.0)
_MAP, _STRONG = "RdYlBu", 0.75
_PANEL, _SIDE = 3.4, 0.6
_FLAT = 0.1


@dataclass(frozen=True)
class Outline:
    """The border of a mask [H, W]."""

    mask: NDArray[np.bool_]
    colour: tuple[float, float, float]
    width: float = 1.0


@dataclass(frozen=True)
class Panel:
    """One picture of a slice.

    Attributes:
        title: Above it.
        layer: [H, W, 4] RGBA over the slice, or nothing.
        outlines: Over that.
        scale: Name, lowest and highest value of the layer, if it is a map of scores.
        below: Words under it.
    """

    title: str
    layer: NDArray[np.float64] | None = None
    outlines: tuple[Outline, ...] = ()
    scale: tuple[str, float, float] | None = None
    below: str = ""


@dataclass(frozen=True)
class Row:
    """The same part of one slice, several times.

    Attributes:
        name: Left of it.
        view: The slice.
        window: Intensities to show as black and white.
        frame: (top, bottom, left, right) in mm of the slice: what is shown of it.
        panels: From left to right.
    """

    name: str
    view: Slice
    window: tuple[float, float]
    frame: tuple[float, float, float, float]
    panels: tuple[Panel, ...]


def draw_rows(rows: Sequence[Row], title: str, legend: Sequence[Patch | Line2D]) -> Figure:
    """Rows of panels, all panels equally wide.

    Args:
        rows: At least one, each with as many panels.
        title: On top.
        legend: Below.
    """
    columns = len(rows[0].panels)
    ratios = [(bottom - top) / (right - left) for top, bottom, left, right in (row.frame for row in rows)]
    more = 0.0
    for row in rows:
        more += 0.3 + (
            0.5 if any(panel.scale for panel in row.panels) else 0.2 * any(panel.below for panel in row.panels)
        )
    width, height = _SIDE + _PANEL * columns, _PANEL * sum(ratios) + more + 0.5 + 0.22 * -(-len(legend) // 4)
    figure = new_figure(width, height)
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for line, row in zip(grid, rows, strict=True):
        for axes, panel in zip(line, row.panels, strict=True):
            _draw_panel(axes, row, panel)
        line[0].set_ylabel(shown_lines(row.name), fontsize=9)
        scale_bar(line[0])
    figure.suptitle(shown_lines(title), fontsize=12)
    figure.legend(
        handles=list(legend), loc="outside lower center", ncols=min(4, len(legend)), fontsize=9, frameon=False
    )
    return figure


def _draw_panel(axes: Axes, row: Row, panel: Panel) -> None:
    paint(axes, row.view, row.window, panel.layer)
    for border in panel.outlines:
        if border.mask.any():
            outline(axes, border.mask, row.view.pixel_mm, border.colour, border.width)
    top, bottom, left, right = row.frame
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_title(shown_lines(panel.title), fontsize=10)
    axes.set_xlabel(shown_lines(panel.below), fontsize=9)
    if panel.scale:
        name, low, high = panel.scale
        bar = axes.inset_axes((0.1, -0.06, 0.8, 0.035))
        colours = ScalarMappable(Normalize(low, high), _MAP)
        ticks = np.linspace(low, high, 3)
        colourbar = axes.figure.colorbar(colours, cax=bar, orientation="horizontal", ticks=ticks)
        digits = 2 if high - low >= _FLAT else 4
        colourbar.ax.set_xticklabels([f"{value:.{digits}f}" for value in ticks], fontsize=8)
        colourbar.set_label(shown(name), fontsize=8)


def shown_lines(text: str) -> str:
    """`shown` for text of several lines."""
    return "\n".join(shown(line) for line in text.split("\n"))


def marks(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[H, W] each -> [H, W, 4]: what of the mask is right in cyan, what is wrong in red."""
    layer = np.zeros((*mask.shape, 4))
    layer[mask & truth] = (*CYAN, _STRONG)
    layer[mask & ~truth] = (*RED, _STRONG)
    return layer


def heat(values: NDArray[np.float32], mask: NDArray[np.bool_], low: float, high: float) -> NDArray[np.float64]:
    """[H, W] each -> [H, W, 4]: the values of the mask from red (low) to blue (high), clear elsewhere."""
    layer: NDArray[np.float64] = colormaps[_MAP](Normalize(low, high, clip=True)(values)).astype(np.float64)
    layer[~mask] = 0
    return layer


def span_of(values: NDArray[np.float32]) -> tuple[float, float]:
    """The scale of scores: 0.5..1, as of candidates' probabilities, unless they leave it or would all look alike."""
    if not len(values):
        return 0.5, 1.0
    low, high = float(values.min()), float(values.max())
    if low < 0.5 or high > 1:
        return low, high if high > low else low + 1
    return (low, high) if _FLAT > high - low > 0 else (0.5, 1.0)


def right_and_wrong() -> list[Patch | Line2D]:
    """The legend of `marks`."""
    return [
        Patch(facecolor=CYAN, edgecolor="black", label="right: the hidden truth agrees"),
        Patch(facecolor=RED, edgecolor="black", label="wrong"),
        white_line("outline of the hidden truth"),
    ]


def white_line(label: str) -> Line2D:
    """A white outline in a legend, on grey so that it can be seen."""
    return Line2D(
        [], [], color="white", linewidth=1.5, label=label, path_effects=[withStroke(linewidth=3.5, foreground="black")]
    )
