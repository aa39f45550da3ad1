"""The report of a run: curves, box plots, overlays and tables in one HTML file (DESIGN.md 4)."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from organseg.errors import StorageError, UsageError
from organseg.files import publish, publish_text
from organseg.metrics import CaseRow, read_case_table
from organseg.report.figures import Curves, draw_curves, draw_organs, png
from organseg.report.overlays import draw_overlay
from organseg.report.page import Picture, Section, render_page
from organseg.report.round_tables import read_rounds
from organseg.report.rounds import ROUND_PICTURES, rounds_section
from organseg.report.views import chosen_cases, load_case
from organseg.runtime.metrics_log import read_metrics
from organseg.strict_yaml import read_yaml

__all__ = ["cache_folder", "case_file", "read_config", "write_report"]

_NAMES = ("curves", "organs", "overlay_best", "overlay_median", "overlay_worst", *ROUND_PICTURES)


def write_report(run: Path) -> Path:
    """Write `RUN/report/`: the pictures, and `index.html`, which holds them all.

    What a run does not have yet is left out, with a line on standard error and in the page that says what to do.

    Args:
        run: The folder of a run.

    Returns:
        The page.

    Raises:
        UsageError: If the folder is no run, or its cache is not where its config says.
        IntegrityError: If a table, a case or a prediction is damaged, or they do not belong together.
        StorageError: If the report cannot be written.
    """
    config = read_config(run)
    notes: list[str] = []
    rows = _read_rows(run, notes)
    pictures = [*_organ_picture(rows), *_overlays(run, config, rows, notes), *_curve_picture(run, notes)]
    sections = _rounds(run, config, notes)
    page = render_page(run.resolve().name, config, rows, pictures, notes, sections)
    pictures += [picture for section in sections for picture in section.pictures]
    for note in notes:
        print(f"organseg: {note}", file=sys.stderr)
    return _publish(run / "report", pictures, page)


def read_config(run: Path) -> Mapping[str, Any]:
    """The options of a run.

    Raises:
        UsageError: If the folder is no run.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UsageError(
            f"{run}: found no config.yaml, so no run; give the folder that `organseg fit` wrote to (--out)"
        )
    config = read_yaml(path)
    if not isinstance(config, Mapping):
        raise UsageError(
            f"{path}: found {type(config).__name__}, expected the options of a run; run `organseg fit` again"
        )
    return config


def _read_rows(run: Path, notes: list[str]) -> list[CaseRow]:
    """The table of cases; without a test, none and a note."""
    table = run / "test" / "cases.csv"
    if not table.exists():
        checkpoint = shlex.quote(str(run / "checkpoints" / "last.ckpt"))
        command = f"organseg test --config {shlex.quote(str(run / 'config.yaml'))} --ckpt_path {checkpoint}"
        notes.append(
            f"no test yet, so no scores and no overlays; after the training, run `{command}`, then report again"
        )
        return []
    rows = read_case_table(table)
    if not rows:
        notes.append(f"{table} has no cases: the fold's test set was empty or left out (trainer.limit_test_batches)")
    return rows


def _curve_picture(run: Path, notes: list[str]) -> list[Picture]:
    figure = draw_curves(_read_curves(run / "metrics.csv"))
    if figure is None:
        notes.append(f"no training curves: {run / 'metrics.csv'} has no numbers yet")
        return []
    return [Picture("curves.png", "Training", png(figure))]


def _read_curves(path: Path) -> Curves:
    """Each metric's finite values, by rising step."""
    found: dict[str, dict[int, float]] = {}
    for step, name, value in read_metrics(path):
        if np.isfinite(value):
            found.setdefault(name, {})[step] = value
    return {
        name: (np.array(sorted(values), np.int64), np.array([values[step] for step in sorted(values)], np.float64))
        for name, values in found.items()
    }


def _organ_picture(rows: Sequence[CaseRow]) -> list[Picture]:
    figure = draw_organs(rows)
    return [] if figure is None else [Picture("organs.png", "DSC of each organ over the test cases", png(figure))]


def _overlays(run: Path, config: Mapping[str, Any], rows: Sequence[CaseRow], notes: list[str]) -> list[Picture]:
    """Pictures of the chosen cases whose prediction was kept."""
    predictions = run / "test" / "predictions"
    organs = list(dict.fromkeys(row.organ for row in rows))
    files = {role: (case, predictions / f"{case}.nii.gz") for role, case in chosen_cases(rows).items()}
    missing = [f"{role} ({path})" for role, (_, path) in files.items() if not path.exists()]
    if missing:
        notes.append(f"no overlay of {', '.join(missing)}: no such predictions; run `organseg test` again to get them")
    pictures = []
    for role, (case, path) in files.items():
        if not path.exists():
            continue
        scored = load_case(case_file(run, config, case), path, organs)
        figure = draw_overlay(scored, role, [row for row in rows if row.case == case])
        title = f"{role.capitalize()} case by mean DSC: {case}"
        pictures.append(Picture(f"overlay_{role}.png", title, png(figure)))
    return pictures


def _rounds(run: Path, config: Mapping[str, Any], notes: list[str]) -> list[Section]:
    """What the relabelling rounds left; nothing for a run without rounds."""
    rounds = read_rounds(run, notes)
    return [rounds_section(rounds, config, cache_folder(run, config), notes)] if rounds else []


def case_file(run: Path, config: Mapping[str, Any], case: str) -> Path:
    """The case in the cache that the run was trained from.

    Raises:
        UsageError: If it is not there.
    """
    cache = cache_folder(run, config)
    path = cache / f"{case}.h5"
    if not path.is_file():
        where = "" if cache.is_absolute() else f", looked for below {Path.cwd()}"
        raise UsageError(
            f"{path}: no such case in the cache (data.init_args.cache of {run / 'config.yaml'}{where}); run this where "
            f"`organseg fit` ran, or correct the path there, or move {run / 'test' / 'predictions'} away for a report "
            "without overlays"
        )
    return path


def cache_folder(run: Path, config: Mapping[str, Any]) -> Path:
    """The cache that the run was trained from.

    Raises:
        UsageError: If its config does not say.
    """
    try:
        return Path(config["data"]["init_args"]["cache"])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{run / 'config.yaml'}: has no data.init_args.cache; write there where the cache is"
        ) from error


def _publish(folder: Path, pictures: Sequence[Picture], page: str) -> Path:
    """Write all files, the page last; pictures of an earlier report that this one lacks are removed."""
    try:
        folder.mkdir(exist_ok=True)
        for name in {f"{name}.png" for name in _NAMES} - {picture.name for picture in pictures}:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written: {error.strerror or error}; free space or ask its owner"
        ) from error
    for picture in pictures:
        content = picture.png
        publish(folder / picture.name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    index = folder / "index.html"
    publish_text(index, page)
    return index
