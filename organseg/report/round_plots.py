"""What the rounds' tables say, as figures: precision and recall over the rounds; volumes and pieces (METHOD.md 1.5)."""

from collections.abc import Mapping, Sequence
from math import isnan, nan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from organseg.anatomy import ORGANS
from organseg.report.figures import colour_of, new_figure, organ_title
from organseg.report.round_tables import CaseLine, RoundTables

_GOLDEN = 0.618034
_BAR = "#d9e4ee"
_ALL = "all voxels"
_FLAGS = {"yes": ("o", "plausible"), "low": ("v", "low"), "high": ("^", "high"), "unknown": ("s", "no range known")}


def pooled(lines: Sequence[CaseLine]) -> tuple[float, float]:
    """Precision and recall of all voxels of lines with hidden truth; NaN where there are none."""
    added, right = sum(line.added for line in lines), sum(line.right or 0 for line in lines)
    missing = sum(line.missing or 0 for line in lines)
    return right / added if added else nan, right / missing if missing else nan


def draw_rates(rounds: Sequence[RoundTables]) -> Figure | None:
    """Precision and recall of the pseudo-labels of each organ and of all voxels: lines over the rounds, bars of one.

    Returns:
        None where no truth is hidden.
    """
    known = [round_tables.known for round_tables in rounds]
    if not any(known):
        return None
    organs = list(dict.fromkeys(line.organ for round_tables in rounds for line in round_tables.organs))
    rates = [(organ, [pooled([line for line in lines if line.organ == organ]) for lines in known]) for organ in organs]
    rates.append((_ALL, [pooled(lines) for lines in known]))
    figure = new_figure(11.0, max(3.8, 1.4 + 0.2 * len(organs)))
    panels = figure.subplots(1, 2, sharey=True)
    places = [round_tables.index for round_tables in rounds]
    for which, (axes, name) in enumerate(zip(panels, ("precision", "recall"), strict=True)):
        values = {organ: [pair[which] for pair in pairs] for organ, pairs in rates}
        if len(places) == 1:
            _draw_bars(axes, values)
        else:
            _draw_lines(axes, places, values)
        axes.set_title(f"{name} of the pseudo-labels", fontsize=10)
        axes.set_xlabel("round" if len(places) > 1 else f"round {places[0]}")
        axes.set_ylim(-0.03, 1.03 if len(places) > 1 else 1.09)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(True, axis="y", alpha=0.25)
    if len(places) > 1:
        panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _rate_colour(organ: str) -> tuple[float, float, float]:
    return (0.0, 0.0, 0.0) if organ == _ALL else colour_of(organ)


def _draw_lines(axes: Axes, places: Sequence[int], values: Mapping[str, Sequence[float]]) -> None:
    for organ, shares in values.items():
        axes.plot(
            places, shares, color=_rate_colour(organ), linewidth=2.6 if organ == _ALL else 1.6,
            label=organ_title(organ), marker="o", markersize=5, markeredgecolor="black", markeredgewidth=0.5,
            clip_on=False,
        )  # fmt: skip
    axes.set_xlim(places[0] - 0.3, places[-1] + 0.3)
    axes.set_xticks(places)


def _draw_bars(axes: Axes, values: Mapping[str, Sequence[float]]) -> None:
    for place, (organ, shares) in enumerate(values.items()):
        words = "none" if isnan(shares[0]) else f"{100 * shares[0]:.0f}"
        height = 0.0 if isnan(shares[0]) else shares[0]
        axes.bar(place, height, color=_rate_colour(organ), edgecolor="black", linewidth=0.6)
        axes.text(place, height + 0.01, words, ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(values)), [organ_title(organ) for organ in values], rotation=40, ha="right", fontsize=8)


def draw_volumes(lines: Sequence[CaseLine]) -> Figure | None:
    """What is taken for each organ of each case against what an adult may have, and in how many pieces it was added.

    Returns:
        None where nothing was added.
    """
    added = [line for line in lines if line.added]
    organs = list(dict.fromkeys(line.organ for line in added))
    if not organs:
        return None
    figure = new_figure(11.0, 1.6 + 0.5 * len(organs))
    volumes, pieces = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (5, 3)})
    for height, organ in enumerate(organs):
        ours = [line for line in added if line.organ == organ]
        if organ in ORGANS:
            low, high = ORGANS[organ].volume_ml
            volumes.barh(height, high - low, left=low, height=0.7, color=_BAR, edgecolor="#8aa4ba", zorder=1)
        for number, line in enumerate(ours):
            # The golden ratio spreads equal values over the bar's height, the same way each time.
            offset = 0.5 * ((number * _GOLDEN) % 1 - 0.5)
            for axes, value in ((volumes, line.taken_ml), (pieces, line.pieces)):
                _draw_mark(axes, value, height + offset, line)
    for axes, name in (
        (volumes, "taken for the organ, added or not (mL); bar: plausible in an adult"),
        (pieces, "pieces added"),
    ):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name)
        axes.grid(True, axis="x", alpha=0.25)
    plausible = [ml for organ in organs if organ in ORGANS for ml in ORGANS[organ].volume_ml]
    seen = [line.taken_ml for line in added if line.taken_ml > 0] + plausible
    if seen:
        volumes.set_xlim(min(seen) / 1.5, max(seen) * 1.5)
    pieces.set_xlim(0.8, 1.5 * max(line.pieces for line in added))
    volumes.set_yticks(range(len(organs)), [organ_title(organ) for organ in organs])
    volumes.set_ylim(len(organs) - 0.5, -0.5)
    flags = [flag for flag in _FLAGS if any(line.plausible == flag for line in added)]
    handles = [
        volumes.scatter([], [], s=26, marker=_FLAGS[flag][0], color="#666666", edgecolors="black", linewidths=0.6,
                        label=f"case, {_FLAGS[flag][1]}") for flag in flags
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_mark(axes: Axes, value: float, height: float, line: CaseLine) -> None:
    if value > 0 and not isnan(value):
        marker, _ = _FLAGS.get(line.plausible, _FLAGS["unknown"])
        axes.scatter(
            value, height, s=26, marker=marker, color=np.array([colour_of(line.organ)]), edgecolors="black",
            linewidths=0.6, zorder=3, clip_on=False,
        )  # fmt: skip
