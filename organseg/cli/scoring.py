"""`organseg evaluate`: anybody's label maps of a data set's scans, with the metrics and conventions of `organseg test`.

So another tool's predictions, or a rater's labels, stand in the same table. What a case does not annotate is unknown,
and has no value, whoever predicted it.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from organseg.anatomy import canonical
from organseg.cli.tested import TESTED
from organseg.data.cache import value_counts
from organseg.data.check import Examined, examine, read_label_of
from organseg.data.manifest import BACKGROUND, CaseEntry, Manifest, load_manifest
from organseg.data.readers.folder import organs_of_json
from organseg.errors import Fault, InputError, StorageError, UsageError
from organseg.files import remove
from organseg.metrics import (
    CaseRow,
    diagonal_mm,
    evaluate_case,
    summarise,
    summary_text,
    write_case_table,
    write_summary,
)
from organseg.processes import in_processes, usable_cores
from organseg.strict_yaml import read_yaml

LABELS = "labels.json"
"""Beside label maps: integer -> organ."""
DATASET_JSON = "dataset.json"
"""Beside nnU-Net's, with `labels`."""


@dataclass(frozen=True)
class Scored:
    """The rows of one case, or the faults for which it was refused; neither where nobody predicted it."""

    case: str
    rows: tuple[CaseRow, ...] = ()
    faults: tuple[Fault, ...] = ()


def evaluate(arguments: Namespace, labels: Mapping[int, str]) -> int:
    """Score all predictions; 3 if some were refused, the others are done."""
    manifest, folder, out = load_manifest(Path(arguments.dataset)), Path(arguments.predictions), Path(arguments.out)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    there = [name for name in ("cases.csv", "summary.csv") if (out / name).exists()]
    if there and not arguments.overwrite:
        raise UsageError(f"{out}: holds {' and '.join(there)} already; choose another --out, or --overwrite")
    meaning = meaning_of(folder, labels, manifest)
    files = predictions_of(folder, manifest)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: cannot be made: {error.strerror}; choose another --out") from error
    for name in (*there, TESTED):
        remove(out / name)
    left_out = [organ for organ in manifest.organs if organ not in meaning.organs.values()]
    if left_out:
        print(f"organseg: warning: {', '.join(left_out)}: not predicted, and not scored", file=sys.stderr)
    refused, rows = 0, list[CaseRow]()
    cases = [case for case in manifest.cases if case.id in files]
    work = partial(score_case, manifest, folder, files, meaning)
    for scored in in_processes(work, cases, arguments.processes or usable_cores()):
        for fault in scored.faults:
            print(fault, file=sys.stderr)
        refused += not scored.rows
        rows += scored.rows
    left = len(manifest.cases) - len(cases)
    if left:
        found = f"{left} of {len(manifest.cases)} cases have no prediction"
        print(f"organseg: warning: {found}, and are in no mean", file=sys.stderr)
    if not rows:
        return 3
    lines = summarise(rows)
    write_case_table(out / "cases.csv", rows)
    write_summary(out / "summary.csv", lines)
    print(f"{summary_text(lines)}\n{out / 'summary.csv'}, {out / 'cases.csv'}")
    return 3 if refused else 0


@dataclass(frozen=True)
class Meaning:
    """What the integers of the predictions are.

    Attributes:
        organs: Integer -> organ, of those that the data set labels.
        others: Whether other integers are other structures, which count as background; else they are faults.
    """

    organs: dict[int, str]
    others: bool


def meaning_of(folder: Path, given: Mapping[int, str], manifest: Manifest) -> Meaning:
    """As given, or as the folder says; where nobody says anything, as in the data set, and that is told.

    Raises:
        UsageError: If an integer cannot be one, the folder's file is not readable, or no organ is in common.
    """
    file = folder / LABELS
    named: Any = given
    if not named and file.exists():
        named = read_yaml(file)  # which JSON is, and nobody's keys are there twice
    elif not named:
        named = organs_of_json(folder / DATASET_JSON)
        if not named:
            print(f"organseg: no {LABELS} beside the label maps: their integers are {manifest.name}'s", file=sys.stderr)
            return Meaning(dict(manifest.labels), others=False)
    if not isinstance(named, Mapping):
        raise UsageError(f"{file}: found {named!r:.40}, expected integers and organs, or --labels 1=liver 2=spleen ...")
    organs: dict[int, str] = {}
    others: list[str] = []
    for value, name in named.items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,2}", str(value)) or int(value) > 255:
            raise UsageError(f"labels: found {value!r:.40}, expected integers from 1 to 255")
        if not int(value) or name == BACKGROUND:
            continue
        try:
            organs[int(value)] = canonical(str(name), manifest.organs)
        except UsageError:
            if given:
                raise
        if organs.get(int(value)) not in manifest.organs:
            others.append(f"{value} ({name})")
    ours = {value: organ for value, organ in organs.items() if value and organ in manifest.organs}
    if not ours:
        known, theirs = ", ".join(manifest.organs), ", ".join(map(str, named.values()))
        raise UsageError(f"{folder}: no organ in common: {theirs:.200} are predicted, {manifest.name} labels {known}")
    if others:
        told = ", ".join(others[:5]) + " ..." * (len(others) > 5)
        print(f"organseg: {told}: background here; where it is a part of an organ, say so by --labels", file=sys.stderr)
    return Meaning(ours, others=True)


def predictions_of(folder: Path, manifest: Manifest) -> dict[str, Path]:
    """Case id -> its label map: as `test` and `predict` name them, or by the case's id, as nnU-Net does.

    Raises:
        UsageError: If there is none at all, or one file would be the prediction of two cases.
    """
    found: dict[str, Path] = {}
    owner: dict[Path, CaseEntry] = {}
    for case in manifest.cases:
        image = case.image.name.removesuffix(".gz").removesuffix(".nii")
        names = dict.fromkeys((f"{manifest.name}/{case.id}", case.id, image))
        wanted = [folder / f"{name}{ending}" for name in names for ending in (".nii.gz", ".nii")]
        path = next((path for path in wanted if path.exists()), None)
        if path is None:
            continue
        if owner.setdefault(path, case).image != case.image:
            raise UsageError(f"{path}: of {owner[path].id} or of {case.id}? Name label maps by the cases' ids")
        found[case.id] = path
    if not found:
        expected = " or ".join(str(path) for path in wanted[::2])
        raise UsageError(f"{folder}: no prediction of any case of {manifest.name}; expected, for {case.id}, {expected}")
    return found


def score_case(
    manifest: Manifest, folder: Path, files: Mapping[str, Path], meaning: Meaning, case: CaseEntry
) -> Scored:
    """All metrics of one case, on its own grid; only of organs that the predictions know."""
    path = files[case.id]
    try:
        truth = examine(manifest, case)
    except InputError as error:
        return Scored(case.id, faults=error.faults)
    preds, faults = read_label_of(truth.image, path, case=case.id, root=folder, affine_source=manifest.affine)
    if preds is not None and not meaning.others:
        values = np.flatnonzero(value_counts(preds.array)).tolist()
        unknown = [str(value) for value in values if value and value not in meaning.organs]
        if unknown:
            expected = f"0 or one of {', '.join(map(str, sorted(meaning.organs)))}"
            remedy = "say what integers mean: --labels 1=liver 2=spleen ..."
            where = str(path.relative_to(folder))
            faults.append(Fault(case.id, where, "label values", ", ".join(unknown), expected, remedy))
    if preds is None or any(fault.refused for fault in faults):
        return Scored(case.id, faults=tuple(faults))
    table = np.zeros(256, dtype=np.uint8)
    for value, organ in meaning.organs.items():
        if organ == BACKGROUND:
            continue
        table[value] = manifest.organs.index(organ) + 1
    return Scored(case.id, tuple(_rows(manifest, case, truth, table[preds.array], meaning)), tuple(faults))


def _rows(
    manifest: Manifest, case: CaseEntry, truth: Examined, preds: np.ndarray, meaning: Meaning
) -> Iterator[CaseRow]:
    known = [organ in case.annotated for organ in manifest.organs]
    scores = evaluate_case(preds, truth.label, known, truth.image.spacing)
    diagonal = diagonal_mm(truth.label.shape, truth.image.spacing)
    for organ, score in zip(manifest.organs, scores, strict=True):
        if organ in meaning.organs.values():
            yield CaseRow(f"{manifest.name}/{case.id}", organ, score, diagonal)
