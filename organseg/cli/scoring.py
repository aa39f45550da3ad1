"""`organseg evaluate`: anybody's label maps of a data set's scans, with the metrics and conventions of `organseg test`.

So another tool's predictions, or a rater's labels, stand in the same table. What a case does not annotate is unknown,
and has no value, whoever predicted it.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from organseg.anatomy import canonical
from organseg.data.cache import value_counts
from organseg.data.check import Examined, examine
from organseg.data.manifest import CaseEntry, Manifest, load_manifest
from organseg.errors import Fault, InputError, StorageError, UsageError
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
from organseg.volumes import compare_geometry, read_label

LABELS = "labels.json"
"""Beside label maps: integer -> organ."""


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
    integers = integers_of(folder, labels) or manifest.labels
    organs = [organ for organ in manifest.organs if organ in integers.values()]
    if not organs:
        ours, theirs = ", ".join(manifest.organs), ", ".join(integers.values())
        raise UsageError(f"{folder}: no organ in common: {theirs} are predicted, {manifest.name} labels {ours}")
    predicted = [case for case in manifest.cases if prediction_of(folder, manifest, case)]
    if not predicted:
        case = manifest.cases[0]
        names = " or ".join(str(path) for path in places(folder, manifest, case))
        raise UsageError(f"{folder}: no prediction of any case of {manifest.name}; expected, for {case.id}, {names}")
    refused, rows = 0, list[CaseRow]()
    work = partial(score_case, manifest, folder, integers)
    for scored in in_processes(work, predicted, arguments.processes or usable_cores()):
        for fault in scored.faults:
            print(fault, file=sys.stderr)
        refused += not scored.rows
        rows += scored.rows
    left = len(manifest.cases) - len(predicted)
    if left:
        found = f"{left} of {len(manifest.cases)} cases have no prediction"
        print(f"organseg: warning: {found}, and are in no mean", file=sys.stderr)
    if not rows:
        return 3
    lines = summarise(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: cannot be made: {error.strerror}; choose another --out") from error
    write_case_table(out / "cases.csv", rows)
    write_summary(out / "summary.csv", lines)
    print(f"{summary_text(lines)}\n{out / 'summary.csv'}, {out / 'cases.csv'}")
    return 3 if refused else 0


def integers_of(folder: Path, given: Mapping[int, str]) -> dict[int, str]:
    """What the predictions' integers mean: as given, or as the folder says; {} where nobody does.

    Raises:
        UsageError: If an organ is unknown, or `labels.json` is not readable.
    """
    file = folder / LABELS
    if given or not file.exists():
        return {value: canonical(organ) for value, organ in given.items()}
    try:
        return {int(value): canonical(str(organ)) for value, organ in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{file}: not readable ({error}); give --labels 1=liver 2=spleen ...") from error


def places(folder: Path, manifest: Manifest, case: CaseEntry) -> Iterator[Path]:
    """Where a prediction may lie: as `test` and `predict` write them, or by the case's id, as nnU-Net does."""
    image = case.image.name.removesuffix(".gz").removesuffix(".nii")
    for name in dict.fromkeys((f"{manifest.name}/{case.id}", case.id, image)):
        yield from (folder / f"{name}.nii.gz", folder / f"{name}.nii")


def prediction_of(folder: Path, manifest: Manifest, case: CaseEntry) -> Path | None:
    """A case's label map, if somebody made one."""
    return next((path for path in places(folder, manifest, case) if path.exists()), None)


def score_case(manifest: Manifest, folder: Path, integers: Mapping[int, str], case: CaseEntry) -> Scored:
    """All metrics of one case, on its own grid; only of organs that the predictions know."""
    path = prediction_of(folder, manifest, case)
    assert path is not None
    try:
        truth = examine(manifest, case)
        preds, faults = read_label(path, case=case.id, root=folder, affine_source=manifest.affine)
    except InputError as error:
        return Scored(case.id, faults=error.faults)
    faults += compare_geometry(truth.image, preds, case=case.id, path=str(path.relative_to(folder)))
    table = np.zeros(256, dtype=np.uint8)
    for value, organ in integers.items():
        if organ in manifest.organs:
            table[value] = manifest.organs.index(organ) + 1
    values = np.flatnonzero(value_counts(preds.array)).tolist()
    unknown = [str(value) for value in values if value and value not in integers]
    if unknown:
        expected = f"0 or one of {', '.join(map(str, sorted(integers)))}"
        faults.append(Fault(case.id, str(path.relative_to(folder)), "label values", ", ".join(unknown), expected,
                            "say what they mean: --labels 1=liver 2=spleen ..."))  # fmt: skip
    if any(fault.refused for fault in faults):
        return Scored(case.id, faults=tuple(faults))
    return Scored(case.id, tuple(_rows(manifest, case, truth, table[preds.array], integers)), tuple(faults))


def _rows(
    manifest: Manifest, case: CaseEntry, truth: Examined, preds: np.ndarray, integers: Mapping[int, str]
) -> Iterator[CaseRow]:
    known = [organ in case.annotated for organ in manifest.organs]
    scores = evaluate_case(preds, truth.label, known, truth.image.spacing)
    diagonal = diagonal_mm(truth.label.shape, truth.image.spacing)
    for organ, score in zip(manifest.organs, scores, strict=True):
        if organ in integers.values():
            yield CaseRow(f"{manifest.name}/{case.id}", organ, score, diagonal)
