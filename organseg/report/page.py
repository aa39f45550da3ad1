"""The report as one HTML file that needs nothing else: pictures and style are inside, scripts there are none.

Whatever comes from a file (names of runs, cases, organs, options) is escaped; the page also forbids the browser to load
anything.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from organseg.metrics import OVERALL, CaseRow, OrganSummary, conventions, summarise
from organseg.report.figures import colour_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } .options td { text-align: left; }
.summary tr:last-child td { font-weight: 600; border-top: 2px solid #1a1a1a; }
.swatch { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.5em; border: 1px solid #555; }
.wide { overflow-x: auto; } .conventions { color: #555; font-size: 0.85rem; white-space: pre-line; }
.note { background: #fff6e0; border-left: 4px solid #e0a020; padding: 0.5rem 1rem; overflow-wrap: anywhere; }
.odd { color: #a33; } img { max-width: 100%; height: auto; } summary { cursor: pointer; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_COLUMNS = ("organ", "cases", "DSC %", "std", "DSC % without both empty", "NSD %", "HD95 mm", "ASD mm", "missed",
            "false positive", "both empty", "unknown")  # fmt: skip
_ATTENTION = ("mhsa", "mhca", "levels", "heads", "positional_encoding", "qk_norm")
"""Options of chapter 5's method, by which its experiments differ."""
_PRIOR = ("use", "cross_fitted", "bins", "smooth_mm", "floor", "centring", "position")
"""Options of STIPPLE."""
_ROUNDS = ("gamma_max", "start", "score", "selection")
"""Options of relabelling, by which SMILE, pseudo-labels and INERRANT differ."""
_SHORT = {"missed": " missed", "false_positive": " false pos.", "both_empty": " both empty"}


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: File name in the report's folder.
        title: What it shows.
        png: Its bytes.
        caption: What to know about it.
    """

    name: str
    title: str
    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class OrganTable:
    """A table with an organ in each line.

    Attributes:
        title: What it shows.
        head: Of its columns; the first are the organs.
        lines: Cells as text, the organ's canonical name first.
        remarks: What to know about it.
    """

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        tables: First these,
        pictures: then these.
    """

    title: str
    tables: Sequence[OrganTable]
    pictures: Sequence[Picture]


def render_page(
    name: str,
    config: Mapping[str, Any],
    rows: Sequence[CaseRow],
    pictures: Sequence[Picture],
    notes: Sequence[str],
    sections: Sequence[Section] = (),
) -> str:
    """The whole page.

    Args:
        name: Of the run.
        config: Of the run, as `config.yaml` has it.
        rows: The table of cases; empty before a test.
        pictures: In the order in which they are shown.
        notes: What is missing, and what to do about it.
        sections: What follows the pictures.
    """
    organs = list(dict.fromkeys(row.organ for row in rows))
    parts = [
        f"<h1>{escape(name)}</h1>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        "<h2>Setup</h2>",
        _table((), [(escape(option), escape(value)) for option, value in key_options(config, organs)], "options"),
    ]
    if rows:
        parts += [
            "<h2>Test</h2>",
            _summary_table(summarise(rows)),
            f'<p class="conventions">{escape(conventions())}</p>',
            f"<details><summary>DSC of each case</summary>{_case_table(rows, organs)}</details>",
        ]
    parts += [_figure(picture) for picture in pictures]
    parts += [_section(section) for section in sections]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: organseg report</title>\n<style>{_STYLE}</style>\n"
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def key_options(config: Mapping[str, Any], organs: Sequence[str]) -> list[tuple[str, str]]:
    """The options that tell one experiment from another, as text; those that the config lacks are left out.

    Args:
        config: Of the run.
        organs: Those of the table of cases: they are known even where the config says `null`, which means all.
    """

    def at(*keys: str) -> Any:
        value: Any = config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    options = ("data", "init_args")
    fold, folds = at(*options, "fold"), at(*options, "folds")
    pairs = {
        "organs": list(organs) or at(*options, "organs") or "all of the data sets",
        "data sets": at(*options, "datasets") or "all in the cache",
        "label share": at(*options, "label_share"),
        "fold": None if fold is None else f"{fold} (of {folds}, counted from 0)",
        "seed": at("seed"),
        "method": _class(at("model"), ()),
        "network": _described(at("model", "init_args", "network")) or None,
        **{name.replace("_", " "): at("model", "init_args", name) for name in _ATTENTION},
        **{f"prior: {name.replace('_', ' ')}": at("model", "init_args", name) for name in _PRIOR},
        "optimiser": _class(at("model", "init_args", "optimizer"), ("lr", "weight_decay")),
        "steps": at("trainer", "max_steps"),
        "rounds": at("curriculum", "rounds"),
        "steps of each round": at("curriculum", "round_steps"),
        **{f"rounds: {name.replace('_', ' ')}": _described(at("curriculum", name)) for name in _ROUNDS},
        "batch size": at(*options, "batch_size"),
        "precision": at("trainer", "precision"),
    }
    return [(name, _text(value)) for name, value in pairs.items() if value is not None]


def _class(entry: Any, options: Sequence[str] | None = None) -> str | None:
    """`organseg.networks.UNet` and its options -> `UNet (width 16, depth 5)`; all options, or those named."""
    if not isinstance(entry, Mapping) or "class_path" not in entry:
        return None
    given = entry.get("init_args") or {}
    details = _described({key: value for key, value in given.items() if options is None or key in options})
    return f"{str(entry['class_path']).rpartition('.')[2]}{details and f' ({details})'}"


def _described(value: Any) -> Any:
    """Options and classes inside of one another as text, `backbone unet, options (norm batch)`; else the value."""
    if not isinstance(value, Mapping):
        return value
    if "class_path" in value:
        return _class(value)
    inner = ((key, item, _described(item)) for key, item in value.items())
    return ", ".join(
        f"{key} ({text})" if isinstance(item, Mapping) and "class_path" not in item else f"{key} {text}"
        for key, item, text in inner
    )


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _summary_table(lines: Sequence[OrganSummary]) -> str:
    """One line an organ, and their mean."""
    cells = []
    for line in lines:
        name = f"<b>{OVERALL} of organs</b>" if line.organ == OVERALL else _organ(line.organ)
        numbers = (line.dsc.mean, line.dsc.std, line.dsc.mean_without_both_empty, line.nsd.mean)
        distances = (line.hd95_mm.mean, line.asd_mm.mean)
        counts = (line.missed, line.false_positive, line.both_empty, line.unknown)
        cells.append(
            (
                name,
                str(line.evaluated),
                *(_number(100 * n) for n in numbers),
                *map(_number, distances),
                *map(str, counts),
            )
        )
    return _table(_COLUMNS, cells, "summary")


def _case_table(rows: Sequence[CaseRow], organs: Sequence[str]) -> str:
    """One line a case, the worst first: its mean over the evaluated organs, and each organ's DSC."""
    by_case: dict[str, dict[str, CaseRow]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.organ] = row

    def mean(case: str) -> float:
        known = [row.score.dsc for row in by_case[case].values() if row.score.outcome != "unknown"]
        return float(np.mean(known)) if known else float("nan")

    def cell(row: CaseRow | None) -> str:
        if row is None or row.score.outcome == "unknown":
            return "&ndash;"
        odd = _SHORT.get(row.score.outcome, "")
        return f"{_number(100 * row.score.dsc)}" + (f' <span class="odd">{odd}</span>' if odd else "")

    means = {case: mean(case) for case in by_case}
    worst_first = sorted(by_case, key=lambda case: (np.isnan(means[case]), means[case], case))
    cells = [
        (escape(case), _number(100 * means[case]), *(cell(by_case[case].get(organ)) for organ in organs))
        for case in worst_first
    ]
    return _table(("case", "mean", *(organ.replace("_", " ") for organ in organs)), cells, "cases")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], kind: str) -> str:
    """A table; `head` is text, the cells of `lines` are HTML."""
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    rows = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines]
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="wide"><table class="{kind}">{thead}<tbody>{"".join(rows)}</tbody></table></div>'


def _organ(name: str) -> str:
    red, green, blue = (round(255 * part) for part in colour_of(name))
    swatch = f'<span class="swatch" style="background: rgb({red}, {green}, {blue})"></span>'
    return swatch + escape(name.replace("_", " "))


def _number(value: float) -> str:
    return "&ndash;" if np.isnan(value) else f"{value:.1f}"


def _figure(picture: Picture, heading: str = "h2") -> str:
    source = f"data:image/png;base64,{b64encode(picture.png).decode('ascii')}"
    caption = f'\n<p class="conventions">{escape(picture.caption)}</p>' if picture.caption else ""
    title = f"<{heading}>{escape(picture.title)}</{heading}>"
    return f'{title}\n<img src="{source}" alt="{escape(picture.title)}">{caption}'


def _section(section: Section) -> str:
    """Its tables and its pictures, each under a heading of its own."""
    parts = [f"<h2>{escape(section.title)}</h2>"]
    for table in section.tables:
        cells = [(_organ(line[0]), *map(escape, line[1:])) for line in table.lines]
        parts += [f"<h3>{escape(table.title)}</h3>", _table(table.head, cells, "organs")]
        parts += [f'<p class="conventions">{escape(remark)}</p>' for remark in table.remarks]
    parts += [_figure(picture, "h3") for picture in section.pictures]
    return "\n".join(parts)
