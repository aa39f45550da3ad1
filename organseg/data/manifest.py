"""`dataset.yaml`: which cases a data set has and who annotates what (DESIGN.md 3).

Three states per case and organ. In `annotated` with voxels: present. In `annotated` without a voxel: absent, a known
fact. Not in `annotated`: unknown, and never background.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from organseg.anatomy import canonical
from organseg.batch import IGNORE
from organseg.errors import UsageError
from organseg.files import publish_text
from organseg.strict_yaml import parse_yaml, read_yaml
from organseg.volumes import AffineSource

MAX_BYTES = 64 << 20
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NEW_ORGAN = re.compile(r"[a-z][a-z0-9_]{0,59}")
_KEYS = {"name", "modality", "labels", "new_organs", "annotated", "hide", "root", "cases", "affine", "assume_affine"}
_CASE_KEYS = {"id", "image", "label", "annotated", "hide", "patient"}
BACKGROUND = "background"
"""What `labels` calls an integer of a structure that is none of the data set's organs."""


@dataclass(frozen=True)
class CaseEntry:
    """One scan of a data set.

    Attributes:
        id: Unique in the data set.
        image: Absolute path.
        label: Absolute path, or None for an unlabelled case.
        annotated: Organs whose truth is known, hidden ones left out.
        hidden: Organs whose voxels are zeroed on reading and become unknown.
        patient: Who it is, the same name in all data sets; None where nobody says. Cases of one patient never lie in
            two folds.
    """

    id: str
    image: Path
    label: Path | None
    annotated: frozenset[str]
    hidden: frozenset[str]
    patient: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Attributes:
        name: Its name, also the folder in a cache.
        modality: CT or MR.
        labels: Integer in the label files -> canonical organ, or `BACKGROUND`; parts of one organ have one name.
        root: Folder that the paths in messages are relative to.
        cases: All cases, in the order of the file.
        affine: Which affine of a NIfTI header counts where its two differ.
        assume_affine: Take the axes of files without an affine as left, anterior, superior.
        new_organs: Names among the labels that the anatomy does not know.
    """

    name: str
    modality: str
    labels: dict[int, str]
    root: Path
    cases: tuple[CaseEntry, ...]
    affine: AffineSource | None = None
    assume_affine: bool = False
    new_organs: tuple[str, ...] = ()

    @property
    def organs(self) -> tuple[str, ...]:
        """Canonical names in the order of the (first) integers."""
        names = dict.fromkeys(self.labels[value] for value in sorted(self.labels))
        return tuple(name for name in names if name != BACKGROUND)

    def patient_of(self, case: CaseEntry) -> str:
        """Who a case is among all data sets; where nobody says, its id, which is unique in its own data set only."""
        if case.patient is not None:
            return case.patient
        return case.id if case.id in self._named_patients else f"{self.name}/{case.id}"

    @cached_property
    def _named_patients(self) -> frozenset[str | None]:
        # `{id: p1}` and `{id: p1_later, patient: p1}` are one person.
        return frozenset(case.patient for case in self.cases)


def load_manifest(path: Path) -> Manifest:
    """Read and check a `dataset.yaml`.

    Raises:
        UsageError: With every fault found, one a line.
    """
    return _manifest(path, read_yaml(path, MAX_BYTES))


def _manifest(path: Path, document: Any) -> Manifest:
    """What a document says that lies, or will lie, at a path."""
    if not isinstance(document, dict):
        raise UsageError(f"{path}: expected keys and values (name, modality, labels, cases), found {document!r:.40}")
    parser = _Parser(path, document)
    manifest = parser.manifest()
    if parser.faults:
        raise UsageError("\n".join(parser.faults))
    return manifest


class _Parser:
    """Collects every fault of one document instead of stopping at the first."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self.document = document
        self.faults: list[str] = []
        self.new_organs: tuple[str, ...] = ()
        root = Path(str(document.get("root", ".")))
        self.root = (root if root.is_absolute() else path.parent / root).resolve()

    def fault(self, where: str, what: str) -> None:
        self.faults.append(f"{self.path}: {where}: {what}")

    def manifest(self) -> Manifest:
        self.unknown_keys("top level", self.document, _KEYS)
        name = _text(self.document.get("name"))
        if not _SAFE_ID.fullmatch(name):
            self.fault("name", f"found {name!r}, expected letters, digits, '.', '_', '-' (at most 100)")
        modality = str(self.document.get("modality"))
        if modality not in ("CT", "MR"):
            self.fault("modality", f"found {modality!r}, expected CT or MR")
        self.new_organs = self.declared()
        labels = self.labels()
        organs = frozenset(labels.values()) - {BACKGROUND}
        default = self.organs("annotated", self.document.get("annotated", sorted(organs)), organs)
        hidden = self.organs("hide", self.document.get("hide", []), organs)
        entries = self.document.get("cases")
        if not isinstance(entries, list) or not entries:
            self.fault("cases", "expected a list of at least one case")
            entries = []
        cases = [self.case(number, entry, default, hidden, organs) for number, entry in enumerate(entries)]
        self.clashes([case.id for case in cases])
        affine, assume = self.document.get("affine"), self.document.get("assume_affine", False)
        if affine not in (None, "sform", "qform"):
            self.fault("affine", f"found {affine!r}, expected sform or qform")
        if not isinstance(assume, bool):
            self.fault("assume_affine", f"found {assume!r}, expected true or false")
        return Manifest(name, modality, labels, self.root, tuple(cases), affine, assume is True, self.new_organs)

    def declared(self) -> tuple[str, ...]:
        raw = self.document.get("new_organs", [])
        if not isinstance(raw, list):
            self.fault("new_organs", f"found {raw!r:.40}, expected a list of names")
            return ()
        for name in raw:
            fault = new_organ_fault(name)
            if fault:
                self.fault("new_organs", fault)
        return tuple(str(name) for name in raw if not new_organ_fault(name))

    def labels(self) -> dict[int, str]:
        raw = self.document.get("labels")
        labels: dict[int, str] = {}
        if not isinstance(raw, dict) or not raw:
            self.fault("labels", "expected integers of the label files and their organs, like {1: liver, 2: spleen}")
            return labels
        for value, name in raw.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < IGNORE:
                self.fault("labels", f"found {value!r}, expected an integer in 1..254 (0 background, 255 ignore)")
                continue
            organ = BACKGROUND if name == BACKGROUND else self.organ(f"labels[{value}]", name)
            if organ:
                labels[value] = organ
        if labels and set(labels.values()) == {BACKGROUND}:
            self.fault("labels", "all are background; expected at least one organ")
        return labels

    def case(
        self, number: int, entry: Any, default: frozenset[str], hidden: frozenset[str], organs: frozenset[str]
    ) -> CaseEntry:
        if not isinstance(entry, dict):
            self.fault(f"cases[{number}]", f"found {entry!r:.40}, expected {{id: ..., image: ..., label: ...}}")
            entry = {}
        name = _text(entry.get("id"))
        where = f"case {name or number}"
        self.unknown_keys(where, entry, _CASE_KEYS)
        if not _SAFE_ID.fullmatch(name):
            self.fault(where, f"id {name!r:.60}: expected letters, digits, '.', '_', '-', a letter or digit first")
        image = self.file(where, "image", entry.get("image"))
        label = self.file(where, "label", entry["label"]) if entry.get("label") is not None else None
        annotated = self.organs(where, entry.get("annotated", sorted(default) if label else []), organs)
        if annotated and label is None:
            self.fault(where, "annotated organs without a label file; give `label` or `annotated: []`")
        hidden = hidden | self.organs(where, entry.get("hide", []), organs)
        patient = _text(entry["patient"]) if "patient" in entry else None
        if patient == "":
            self.fault(where, f"patient: found {entry['patient']!r:.40}, expected a name")
        return CaseEntry(name, image, label, annotated - hidden, hidden, patient)

    def organ(self, where: str, name: Any) -> str:
        try:
            return canonical(str(name), self.new_organs)
        except UsageError as error:
            self.fault(where, str(error))
            return ""

    def organs(self, where: str, names: Any, known: frozenset[str]) -> frozenset[str]:
        if not isinstance(names, list):
            self.fault(where, f"found {names!r:.40}, expected a list of organs")
            return frozenset()
        found = {self.organ(where, name) for name in names} - {""}
        for organ in sorted(found - known):
            self.fault(where, f"{organ} is not among this data set's labels")
        return frozenset(found & known)

    def file(self, where: str, field: str, value: Any) -> Path:
        if not isinstance(value, str) or not value:
            self.fault(where, f"{field}: found {value!r}, expected a path")
            return self.root
        try:
            path = (self.root / value).resolve()
            exists = path.exists()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, links in a circle
            self.fault(where, f"{field}: {value!r:.60} is no path ({error})")
            return self.root
        if not path.is_relative_to(self.root):
            self.fault(where, f"{field}: {value!r} leaves the root {self.root}; `root:` says where files lie")
        elif not exists:
            self.fault(where, f"{field}: {value!r} does not exist below {self.root}")
        return path

    def unknown_keys(self, where: str, found: dict[str, Any], known: set[str]) -> None:
        for key in sorted(set(map(str, found)) - known):
            self.fault(where, f"unknown key {key!r}; known: {', '.join(sorted(known))}")

    def clashes(self, ids: list[str]) -> None:
        # On file systems that ignore case, img01 and IMG01 would be one cache file.
        for name, count in Counter(name.lower() for name in ids).items():
            if count > 1:
                self.fault(f"case {name}", f"{count} cases have this id (upper and lower case are the same)")


def new_organ_fault(name: Any) -> str:
    """What is wrong with a name for an organ that the anatomy does not know; "" if nothing is."""
    if not isinstance(name, str) or not _NEW_ORGAN.fullmatch(name) or name == BACKGROUND:
        return f"found {name!r:.40}, expected a name of lower-case letters, digits and '_'"
    try:
        known = canonical(name)
    except UsageError:
        return ""
    return f"{name} is known already, as {known}"


def _text(value: Any) -> str:
    """A name, also where YAML took it for a number; "" for anything else."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `dataset.yaml` atomically; organs annotated by default are left out of the cases.

    Raises:
        UsageError: If it would not be one, with every fault found; what lies there stays.
        StorageError: If it cannot be written.
    """
    default = frozenset(manifest.organs)
    cases = []
    for case in manifest.cases:
        entry: dict[str, Any] = {"id": case.id, "image": str(case.image.relative_to(manifest.root))}
        if case.label:
            entry["label"] = str(case.label.relative_to(manifest.root))
            if case.annotated != default:
                entry["annotated"] = sorted(case.annotated)
        if case.hidden:
            entry["hide"] = sorted(case.hidden)
        if case.patient is not None:
            entry["patient"] = case.patient
        cases.append(entry)
    head: dict[str, Any] = {
        "name": manifest.name,
        "modality": manifest.modality,
        "labels": dict(sorted(manifest.labels.items())),
        "annotated": list(manifest.organs),
    }
    if manifest.new_organs:
        head["new_organs"] = list(manifest.new_organs)
    if manifest.affine:
        head["affine"] = manifest.affine
    if manifest.assume_affine:
        head["assume_affine"] = True
    if manifest.root != path.parent.resolve():
        head["root"] = str(manifest.root)
    text = yaml.safe_dump(head, sort_keys=False) + "cases:\n"
    for entry in cases:
        text += "- " + yaml.safe_dump(entry, default_flow_style=True, width=10_000, sort_keys=False)
    _manifest(path, parse_yaml(text, str(path)))
    publish_text(path, text)
