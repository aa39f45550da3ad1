"""The relabelling rounds of a run in its report: tables, pictures, and what a person should check (METHOD.md 1.5, 1.6).

Everything comes from files that the rounds left: their tables say what there is, and how much of it is right where
truth was hidden; pseudo-labels and cache are opened for the few cases that are drawn. No network runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from organseg.anatomy import ORGANS
from organseg.report.figures import png
from organseg.report.page import OrganTable, Picture, Section
from organseg.report.round_choices import grown, most_and_least_certain, whole_case, worst_and_typical
from organseg.report.round_pictures import (
    Places,
    candidates_figure,
    certain_figure,
    growth_figure,
    whole_case_figure,
)
from organseg.report.round_plots import draw_rates, draw_volumes, pooled
from organseg.report.round_tables import RoundTables

ROUND_PICTURES = ("rounds", "round_worst", "round_typical", "round_growth", "round_case", "round_certain",
                  "round_volumes")  # fmt: skip
"""Names of all pictures that rounds may have."""

_ALL = "all organs"
_SCORES = {
    "confidence": "learned confidence",
    "LearnedConfidence": "learned confidence",
    "mcp": "probability (MCP)",
    "MaximumClassProbability": "probability (MCP)",
    "CrossFittedConfidence": "mean probability with judges",
}
_EXPLANATION = (
    "Precision and recall of all pseudo-labels whose truth is hidden; AUC and AP of the ranking of all candidates, of "
    f"right ones (success) and of wrong ones (error). {_ALL.capitalize()}: their voxels together."
)
_MAPS = "Maps go from 0.5 to 1, or over the scores that there are, if these leave it or differ by less than 0.1."
_RANKING = {"auc": "AUC", "ap_success": "AP success", "ap_error": "AP error"}


def rounds_section(rounds: Sequence[RoundTables], config: Mapping[str, Any], cache: Path, notes: list[str]) -> Section:
    """What the report says of the rounds.

    Args:
        rounds: The relabelled ones, at least one.
        config: Of the run.
        cache: The cache that it was trained from.
        notes: Gets a line for what is missing.

    Raises:
        IntegrityError: If a case or its pseudo-labels are damaged, or they do not belong together.
    """
    share = _shares(config)
    places, score, averaged = Places(cache, tuple(rounds)), score_name(config), averaging(config)
    tables = [organ_table(round_tables, share(round_tables.index), score, averaged) for round_tables in rounds]
    if any(round_tables.known for round_tables in rounds):
        tables[-1] = replace(tables[-1], remarks=[*tables[-1].remarks, _EXPLANATION])
    with_truth = _with_truth(places, share, score, averaged, notes)
    pictures = [*_rates(rounds), *with_truth, *_without_truth(places, score, averaged, notes)]
    flagged = flagged_table(places.last)
    return Section("Relabelling", [*tables, *([flagged] if flagged else [])], pictures)


def score_name(config: Mapping[str, Any]) -> str:
    """What the run's score is called."""
    score = _curriculum(config).get("score", "score")
    name = str(score.get("class_path", "score") if isinstance(score, Mapping) else score).rpartition(".")[2]
    return _SCORES.get(name, name)


def averaging(config: Mapping[str, Any]) -> str:
    """How scores and probabilities of the pseudo-labels were averaged; empty where they were not."""
    selection = _curriculum(config).get("selection")
    smooth_mm = selection.get("smooth_mm") if isinstance(selection, Mapping) else None
    return f"averaged over {smooth_mm:g} mm" if isinstance(smooth_mm, int | float) and smooth_mm else ""


def _curriculum(config: Mapping[str, Any]) -> Mapping[str, Any]:
    options = config.get("curriculum")
    return options if isinstance(options, Mapping) else {}


def _shares(config: Mapping[str, Any]) -> Callable[[int], float | None]:
    """Round -> share of the candidates that it adds; None where the config does not say."""
    options = _curriculum(config)
    rounds, most = options.get("rounds"), options.get("gamma_max")

    def share(index: int) -> float | None:
        if isinstance(rounds, int) and isinstance(most, int | float) and rounds > 0:
            return min(1.0, index / rounds * most)
        return None

    return share


def organ_table(round_tables: RoundTables, share: float | None, score: str, averaged: str = "") -> OrganTable:
    """One line an organ, and one of all voxels; what is known only with hidden truth is left out without it."""
    lines = round_tables.organs
    known = any(not isnan(value) for line in lines for value in line.rates.values())
    same = all(
        line.rates[f"score_{name}"] == line.rates[f"probability_{name}"] or isnan(line.rates[f"score_{name}"])
        for line in lines
        for name in _RANKING
    )
    several = any(line.added != line.added_now for line in lines)  # what earlier rounds added stays
    head = ["organ", "candidates", *(["added now", "added so far"] if several else ["added"])]
    columns: list[str] = []
    if known:
        ranking = [(f"{kind}_{name}", name) for name in _RANKING for kind in ("score", "probability")]
        ranking = [(column, name) for column, name in ranking if not (same and column.startswith("probability"))]
        columns = ["precision", "recall", *(column for column, _ in ranking)]
        head += ["precision %", "recall %"]
        head += [
            f"{_RANKING[name]} %" + ("" if same else f", {score if column.startswith('score') else 'probability'}")
            for column, name in ranking
        ]
    counts = [(line.candidates, *([line.added_now] if several else []), line.added) for line in lines]
    cells = [
        (line.organ, *map(str, numbers), *(_hundred(line.rates[column]) for column in columns))
        for line, numbers in zip(lines, counts, strict=True)
    ]
    if len(lines) > 1:
        totals = map(str, map(sum, zip(*counts, strict=True)))
        rates = [*map(_hundred, pooled(round_tables.known)), *[""] * (len(columns) - 2)] if known else []
        cells.append((_ALL, *totals, *rates))
    empty = [line.organ.replace("_", " ") for line in lines if not line.candidates]
    remarks = [f"No candidate of {', '.join(empty)}: nothing to add in this round."] if empty else []
    what = "" if share is None else f": at most the {100 * share:.0f} % of the candidates with the highest {score}"
    what += f", {averaged}" if what and averaged else ""
    return OrganTable(f"Round {round_tables.index}{what}", head, cells, remarks)


def _hundred(share: float) -> str:
    return "\u2013" if isnan(share) else f"{100 * share:.1f}"


def flagged_table(round_tables: RoundTables) -> OrganTable | None:
    """The cases without truth in which an organ's candidates have a volume that no adult has; None without any."""
    lines = [line for line in round_tables.unknown if line.plausible in ("low", "high")]
    if not lines:
        return None
    cells = []
    for line in sorted(lines, key=lambda line: (line.organ, line.case)):
        low, high = ORGANS[line.organ].volume_ml if line.organ in ORGANS else (0.0, 0.0)
        numbers = (f"{line.taken_ml:.1f}", f"{low:g} to {high:g}", line.plausible, str(line.pieces))
        cells.append((line.organ, line.case, *numbers))
    remarks = ["Look at these cases first: what is taken for the organ is too small or too large for an adult."]
    head = ("organ", "case", "volume mL", "plausible mL", "volume is", "pieces")
    return OrganTable(f"Round {round_tables.index}: implausible volumes", head, cells, remarks)


def _rates(rounds: Sequence[RoundTables]) -> list[Picture]:
    figure = draw_rates(rounds)
    return [] if figure is None else [Picture("rounds.png", "Precision and recall over the rounds", png(figure))]


def _with_truth(
    places: Places, share: Callable[[int], float | None], score: str, averaged: str, notes: list[str]
) -> list[Picture]:
    """Pictures against hidden truth; none where no truth is hidden."""
    pictures = []
    choosing = [round_tables for round_tables in places.rounds if (share(round_tables.index) or 1) < 1]
    shown = choosing[-1] if choosing else places.last
    rules = {"worst": "the most wrong pseudo-labels", "typical": "the median precision of its pseudo-labels"}
    which = "the last round that leaves candidates out" if choosing else "the last round"
    likely = "By probability: as many voxels as were added, but the most probable ones. "
    likely = "" if score == _SCORES["mcp"] else likely
    for role, line in worst_and_typical(shown).items():
        if _there(places, [line.case], [shown], notes, f"of the {role} pseudo-labels"):
            figure = candidates_figure(places, shown, line, score, averaged)
            caption = (
                f"Chosen: of round {shown.index}, {which}, the organ of a case with {rules[role]}; the slice with most "
                f"candidates. {likely}{_MAPS}"
            )
            title = f"How candidates are chosen: {role} case"
            pictures.append(_picture(f"round_{role}", title, figure, caption))
    lines = grown(places.last)
    if lines and _there(places, [line.case for line in lines], places.rounds, notes, "of organs over the rounds"):
        caption = (
            f"Chosen: the organs with the best, the median and the worst recall in round {places.last.index}, each in "
            "its case of median recall; the slice with most of the hidden truth."
        )
        pictures.append(_picture("round_growth", "Organs over the rounds", growth_figure(places, lines), caption))
    key = whole_case(places.last)
    if key and _there(places, [key], [places.rounds[0], places.last], notes, "of a whole case"):
        caption = (
            "Chosen: of the cases that annotate some of these organs (of all, where none does) those with most others "
            f"relabelled in round {places.last.index}, and of these the one with the median precision; the axial slice "
            "with most organs, and the coronal one amid the organs' centres. Precision and recall are those of round "
            f"{places.last.index}."
        )
        title = f"A whole case before and after: {key}"
        pictures.append(_picture("round_case", title, whole_case_figure(places, key), caption))
    return pictures


def _without_truth(places: Places, score: str, averaged: str, notes: list[str]) -> list[Picture]:
    """Pictures of what nobody knows; none where all truth is only hidden."""
    pictures = []
    index = places.last.index
    chosen, gone = most_and_least_certain(places.last)
    if gone:
        notes.append(f"no picture considers {', '.join(gone)}: {places.last.labels} has no such pseudo-labels")
    if chosen and _there(places, [line.case for _, line, _ in chosen], [places.last], notes, "of certain cases"):
        caption = (
            f"Chosen: the organ of a case with the highest and the lowest mean {score} of the voxels added in round "
            f"{index}; the slice with most of them. No truth is known here: judge by eye. {_MAPS}"
        )
        title = "The most and the least certain pseudo-labels"
        pictures.append(_picture("round_certain", title, certain_figure(places, chosen, score, averaged), caption))
    volumes = draw_volumes(places.last.unknown)
    if volumes is not None:
        caption = (
            "Volumes are of all that is taken for an organ, added or not: a share of it would never look too large. "
            "Pieces are connected components of what was added: a kidney has one; stray ones are often mistakes."
        )
        title = f"Volumes taken for the organs, and pieces added, in round {index}"
        pictures.append(_picture("round_volumes", title, volumes, caption))
    return pictures


def _picture(name: str, title: str, figure: Figure, caption: str) -> Picture:
    return Picture(f"{name}.png", title, png(figure), caption)


def _there(places: Places, cases: Sequence[str], rounds: Sequence[RoundTables], notes: list[str], what: str) -> bool:
    """Whether all files of a picture are there; otherwise a note says which are not."""
    missing = [str(path) for path in dict.fromkeys(path for case in cases for path in places.missing(case, rounds))]
    if missing:
        notes.append(f"no picture {what}: {', '.join(missing)} not there; put it back, then report again")
    return not missing
