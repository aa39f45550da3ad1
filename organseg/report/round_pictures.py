"""The pictures of relabelled cases (METHOD.md 1.5; the thesis's Figures 3.5 to 3.8).

Cases are read one at a time, and only what is drawn of them is kept. Where hidden truth exists, pictures show what is
right; elsewhere they show what a person should look at first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from organseg.batch import IGNORE
from organseg.data.pseudo_labels import PseudoLabels, path_of
from organseg.report.figures import colour_of, organ_title
from organseg.report.overlays import crop, fill
from organseg.report.round_figures import (
    WHITE,
    Outline,
    Panel,
    Row,
    draw_rows,
    heat,
    marks,
    right_and_wrong,
    span_of,
    white_line,
)
from organseg.report.round_tables import CaseLine, RoundTables
from organseg.report.round_views import (
    RelabelledCase,
    channel_of,
    frame_of,
    fullest,
    likely_choice,
    load_labels,
    load_relabelled,
    piece_of,
    upright,
)
from organseg.report.views import Slice, View, busiest

_MOST_COLUMNS = 5


@dataclass(frozen=True)
class Places:
    """Where a run's files are.

    Attributes:
        cache: The cache that the run was trained from.
        rounds: The relabelled rounds, at least one.
    """

    cache: Path
    rounds: tuple[RoundTables, ...]

    @property
    def last(self) -> RoundTables:
        """The last round."""
        return self.rounds[-1]

    def missing(self, case: str, rounds: Sequence[RoundTables]) -> list[Path]:
        """The files of a case that are not there, of those that these rounds need."""
        files = [self.cache / f"{case}.h5", *(path_of(round_tables.labels, case) for round_tables in rounds)]
        return [path for path in files if not path.is_file()]

    def load(self, case: str, round_tables: RoundTables) -> RelabelledCase:
        """The case, without pseudo-labels."""
        unknown = [line.organ for line in round_tables.cases if line.case == case]
        return load_relabelled(self.cache / f"{case}.h5", round_tables.labels, unknown)

    def labels(self, case: RelabelledCase, round_tables: RoundTables) -> PseudoLabels:
        """A round's pseudo-labels of it."""
        return load_labels(round_tables.labels, case, [line for line in round_tables.cases if line.case == case.key])


def candidates_figure(
    places: Places, round_tables: RoundTables, line: CaseLine, score: str, averaged: str = ""
) -> Figure:
    """Candidates, their probability and their score, and what either would add (Figure 3.5).

    Args:
        places: The run's files.
        round_tables: The round.
        line: Organ and case, with hidden truth.
        score: What the score is called.
        averaged: How scores and probabilities were averaged, if they were.
    """
    case = places.load(line.case, round_tables)
    voxels = places.labels(case, round_tables)
    value = channel_of(case, line) + 1
    candidates, truth = voxels.candidate == value, case.truth == value
    chosen = (voxels.label == value) & (voxels.round == round_tables.index)
    z = fullest(candidates)
    view = case.axial(z)
    border = (Outline(truth[z], WHITE),)

    def rated(title: str, mask: NDArray[np.bool_]) -> Panel:
        count = int(mask.sum())
        below = f"{count} voxels in the whole case"
        if count:
            below += f", {_percent((mask & truth).sum() / count)} of them right"
        return Panel(title, marks(mask[z], truth[z]), border, below=below)

    def mapped(name: str, values: NDArray[np.float32]) -> Panel:
        low, high = span_of(values[candidates])
        title, scale = (f"{name}{between}{averaged}" if averaged else name for between in ("\n", ", "))
        return Panel(title, heat(values[z], candidates[z], low, high), border, (scale, low, high))

    top = [Panel("image", None, border), mapped("probability (MCP)", voxels.probability)]
    bottom = [rated("candidates", candidates)]
    if np.array_equal(voxels.score, voxels.probability):
        bottom.append(rated("added", chosen))
    else:
        top.append(mapped(score, voxels.score))
        likely = likely_choice(voxels, piece_of(candidates, chosen), int(chosen.sum()))
        bottom += [rated("as many by probability", likely), rated(f"added: by {score}", chosen)]
    frame = frame_of(candidates[z] | truth[z], view.pixel_mm)
    rows = [Row(view.caption, view, case.window, frame, tuple(panels)) for panels in (top, bottom)]
    title = f"round {round_tables.index}: {organ_title(line.organ)} of {case.key}"
    return draw_rows(rows, title, right_and_wrong())


def growth_figure(places: Places, lines: Sequence[CaseLine]) -> Figure:
    """Each organ's pseudo-labels in one slice, round after round, beside the hidden truth (Figure 3.6)."""
    rounds = [places.rounds[place] for place in _spread(len(places.rounds))]
    rows = [_growth_row(places, rounds, line) for line in lines]
    return draw_rows(rows, "pseudo-labels, round after round", right_and_wrong())


def _spread(count: int) -> list[int]:
    """All places, or as many as fit, evenly from first to last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, _MOST_COLUMNS))})


def _growth_row(places: Places, rounds: Sequence[RoundTables], line: CaseLine) -> Row:
    case = places.load(line.case, places.last)
    value = channel_of(case, line) + 1
    truth = case.truth == value
    z = fullest(truth)
    view, border = case.axial(z), (Outline(truth[z], WHITE),)
    panels = [Panel("hidden truth", marks(truth[z], truth[z]), border)]
    shown = truth[z]
    for round_tables in rounds:
        mask = places.labels(case, round_tables).label[z] == value
        shown = shown | mask
        below = "".join(
            f"whole case: precision {_percent(row.precision)}, recall {_percent(row.recall)}"
            for row in round_tables.known
            if (row.case, row.organ) == (line.case, line.organ)
        )
        panels.append(Panel(f"round {round_tables.index}", marks(mask, truth[z]), border, below=below))
    name = f"{organ_title(line.organ)}\n{case.key}\n{view.caption}"
    return Row(name, view, case.window, frame_of(shown, view.pixel_mm), tuple(panels))


def whole_case_figure(places: Places, key: str) -> Figure:
    """All organs of a case: annotated, with the first and the last round's pseudo-labels, and in truth (Figure 3.8)."""
    case = places.load(key, places.last)
    ends = list(dict.fromkeys((places.rounds[0].index, places.last.index)))
    rounds = [round_tables for round_tables in places.rounds if round_tables.index in ends]
    found = [places.labels(case, round_tables).label for round_tables in rounds]
    z, y = busiest(case.truth, len(case.organs))
    cuts = ((case.axial(z), lambda volume: volume[z]), (case.coronal(y), lambda volume: upright(volume, y)))
    rows = [
        _whole_row(case, view, cut(case.annotated), [cut(label) for label in found], cut(case.truth), ends)
        for view, cut in cuts
    ]
    lines = {line.organ: line for line in places.last.cases if line.case == key}
    legend: list[Patch | Line2D] = [_organ_patch(case, organ, lines.get(organ)) for organ in case.organs]
    return draw_rows(rows, f"{key}: what is annotated, what was added", [*legend, white_line("annotated")])


def _whole_row(
    case: RelabelledCase,
    view: Slice,
    annotated: NDArray[np.uint8],
    found: Sequence[NDArray[np.uint8]],
    truth: NDArray[np.uint8],
    ends: Sequence[int],
) -> Row:
    colours = np.array([colour_of(organ) for organ in case.organs])

    def panel(title: str, label: NDArray[np.uint8]) -> Panel:
        values = np.unique(label[(label > 0) & (label != IGNORE)])
        borders = [Outline(label == value, colour_of(case.organs[value - 1])) for value in values]
        borders += [Outline((label == value) & (annotated == value), WHITE) for value in values]
        return Panel(title, fill(label, colours), tuple(borders))

    merged = [np.where(annotated == 0, label, annotated) for label in found]
    panels = [
        panel("annotated", annotated),
        *(panel(f"with round {index}", label) for index, label in zip(ends, merged, strict=True)),
        panel("truth", truth),
    ]
    everything = np.maximum.reduce([truth, *merged])
    content = View(view.caption, view.top, view.image, view.pixel_mm, truth, everything)
    return Row(view.caption, view, case.window, crop(content, case.window), tuple(panels))


def _organ_patch(case: RelabelledCase, organ: str, line: CaseLine | None) -> Patch:
    if line is None:
        words = "annotated" if case.shown[case.organs.index(organ)] else "nothing known"
    elif line.right is None:
        words = "truth unknown"
    elif not line.missing:
        words = "truly absent" + (f", {line.added} voxels added" if line.added else "")
    elif not line.added:
        words = "nothing added"
    else:
        words = f"precision {_percent(line.precision)}, recall {_percent(line.recall)}"
    return Patch(color=colour_of(organ), label=f"{organ_title(organ)}: {words}")


def certain_figure(
    places: Places, chosen: Sequence[tuple[str, CaseLine, float]], score: str, averaged: str = ""
) -> Figure:
    """What was added in the most and the least certain cases, for a person to judge.

    Args:
        places: The run's files.
        chosen: Role, organ and case, and the mean score of what was added.
        score: What the score is called.
        averaged: How scores were averaged, if they were.
    """
    rows = []
    title = f"{score}\n{averaged}".rstrip()
    for role, line, mean in chosen:
        case = places.load(line.case, places.last)
        voxels = places.labels(case, places.last)
        value = channel_of(case, line) + 1
        mask = (voxels.label == value) & (voxels.round == places.last.index)
        z = fullest(mask)
        view, colour = case.axial(z), colour_of(line.organ)
        low, high = span_of(voxels.score[mask])
        layer = np.zeros((*mask[z].shape, 4))
        layer[mask[z]] = (*colour, 0.45)
        panels = (
            Panel("image"),
            Panel("added", layer, (Outline(mask[z], colour),), below=f"{line.volume_ml:.1f} mL, pieces: {line.pieces}"),
            Panel(title, heat(voxels.score[z], mask[z], low, high), (), (f"mean {mean:.3f}", low, high)),
        )
        name = f"{role}: {organ_title(line.organ)}\n{case.key}\n{view.caption}"
        rows.append(Row(name, view, case.window, frame_of(mask[z], view.pixel_mm), panels))
    legend: list[Patch | Line2D] = [
        Patch(color=colour_of(organ), label=organ_title(organ))
        for organ in dict.fromkeys(line.organ for _, line, _ in chosen)
    ]
    return draw_rows(rows, f"the most and the least certain pseudo-labels of round {places.last.index}", legend)


def _percent(share: float) -> str:
    return "-" if isnan(share) else f"{100 * share:.0f} %"
