"""Looking at every case of a data set: all faults of all cases, and who annotates what.

`prepare` goes through `examine` too, so that what `check` passes is exactly what is prepared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organseg.anatomy import ORGANS
from organseg.batch import IGNORE
from organseg.data.cache import value_counts
from organseg.data.manifest import BACKGROUND, CaseEntry, Manifest
from organseg.errors import Fault, InputError
from organseg.files import sha256_if_readable
from organseg.processes import in_processes
from organseg.volumes import AffineSource, Volume, compare_geometry, read_image, read_label, to_canonical, to_file


@dataclass(frozen=True)
class Examined:
    """A case that may be used, with its warnings.

    Attributes:
        image: The scan.
        label: uint8 [Z, Y, X], value i + 1 is the manifest's organ i, hidden organs 0, 255 ignore.
        warnings: Faults that do not prevent its use.
        image_sha256: Of the image file.
        label_sha256: Of the label file, or "".
    """

    image: Volume
    label: NDArray[np.uint8]
    warnings: tuple[Fault, ...]
    image_sha256: str
    label_sha256: str


def examine(manifest: Manifest, case: CaseEntry) -> Examined:
    """Read and judge one case.

    Raises:
        InputError: With every fault found, if one of them forbids the use.
    """
    # Hashed before they are read: a file that changes in between is found to be another one next time.
    image_sha256 = sha256_if_readable(case.image)
    label_sha256 = sha256_if_readable(case.label) if case.label else ""
    options: dict[str, Any] = {"case": case.id, "root": manifest.root, "affine_source": manifest.affine}
    image, faults = _attempt(
        read_image, case.image, **options, modality=manifest.modality, assume_affine=manifest.assume_affine
    )
    label = None
    if case.label is not None:
        label, more = read_label_of(image, case.label, **options)
        faults += more
    stored = None
    if label is not None:
        stored, more = _renumber(manifest, case, label.array)
        faults += more
    if image is None or any(fault.refused for fault in faults):
        raise InputError(faults)
    if stored is None:
        stored = np.zeros(image.array.shape, dtype=np.uint8)
    faults += _implausible(manifest, case, image, stored)
    return Examined(image, stored, tuple(faults), image_sha256, label_sha256)


def read_label_of(
    image: Volume | None, path: Path, *, case: str, root: Path, affine_source: AffineSource | None
) -> tuple[Volume | None, list[Fault]]:
    """A label map of a scan, and all faults; None where it cannot be read.

    One without an affine, as BTCV's originals are, lies on its image's grid if it has that shape.
    """
    label, faults = _attempt(read_label, path, case=case, root=root, affine_source=affine_source, assume_affine=True)
    if image is None or label is None:
        return label, faults
    where = str(path.relative_to(root))
    if any(fault.field == "affine" for fault in faults):
        label = _on_the_grid_of(image, label)
        found, expected = "no affine of its own", "the image's affine"
        faults = [fault for fault in faults if fault.field != "affine"]
        faults.append(Fault(case, where, "affine", found, expected, "taken from its image", refused=False))
    return label, faults + compare_geometry(image, label, case=case, path=where)


def _on_the_grid_of(image: Volume, label: Volume) -> Volume:
    """A label map whose axes were assumed, voxel for voxel on its image's grid; as it is where shapes differ."""
    voxels, wanted = to_file(label.array, label.affine), to_file(image.array, image.affine)
    if voxels.shape != wanted.shape:
        return label
    return Volume(np.ascontiguousarray(to_canonical(voxels, image.affine)), image.spacing, image.affine)


def _attempt(
    read: Callable[..., tuple[Volume, list[Fault]]], path: Path, **options: Any
) -> tuple[Volume | None, list[Fault]]:
    """A file's volume and warnings, or None and its faults."""
    try:
        return read(path, **options)
    except InputError as error:
        return None, list(error.faults)


def _renumber(manifest: Manifest, case: CaseEntry, label: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], list[Fault]]:
    """The file's integers to the cache's, and what does not fit the partial-label contract."""
    values = np.flatnonzero(value_counts(label))
    table = np.zeros(256, dtype=np.uint8)
    table[IGNORE] = IGNORE
    faults = []
    for value in values[(values > 0) & (values < IGNORE)].tolist():
        organ = manifest.labels.get(value)
        if organ is None:
            expected = f"0, 255 or one of {', '.join(map(str, sorted(manifest.labels)))}"
            remedy = "name it under `labels:`; a part of an organ as that organ, what is none as background"
            faults.append(_fault(manifest, case, "label values", str(value), expected, remedy))
        elif organ == BACKGROUND:
            continue
        elif organ in case.annotated:
            table[value] = manifest.organs.index(organ) + 1
        elif organ not in case.hidden:
            remedy = "add it to the case's `annotated`, or to `hide` to zero its voxels"
            faults.append(_fault(manifest, case, "label values", f"{organ} ({value})", "annotated organs only", remedy))
    return table[label], faults


def _implausible(manifest: Manifest, case: CaseEntry, image: Volume, label: NDArray[np.uint8]) -> list[Fault]:
    """Warnings: absent organs, volumes and intensities that no adult has, left and right swapped."""
    counts = value_counts(label)
    millilitres = counts * float(np.prod(image.spacing)) / 1000
    faults = []

    def warn(organ: str, found: str, expected: str, remedy: str) -> None:
        faults.append(_fault(manifest, case, organ, found, expected, remedy, refused=False))

    for value, name in enumerate(manifest.organs, start=1):
        if name not in case.annotated:
            continue
        if not counts[value]:
            warn(name, "no voxel", "voxels of an annotated organ", "taken as absent; if it is not annotated, say so")
            continue
        organ = ORGANS.get(name)
        if organ is None:  # a new one, of which nothing is known
            continue
        low, high = organ.volume_ml
        if not low <= millilitres[value] <= high:
            warn(name, f"{millilitres[value]:.1f} mL", f"{low:g} to {high:g} mL", "look at the label")
        if manifest.modality == "CT":
            mean = float(image.array[label == value].mean())
            low, high = organ.mean_hu
            if not low <= mean <= high:
                warn(name, f"mean {mean:.0f} HU", f"{low:g} to {high:g} HU", "look at the label and the units")
        if organ.mirror in manifest.organs and name.startswith("left_"):
            other = manifest.organs.index(organ.mirror) + 1
            if counts[other] and _column(label, value) < _column(label, other):
                warn(name, f"right of {organ.mirror}", "left of it", "check the affine and the label integers")
    return faults


def _column(label: NDArray[np.uint8], value: int) -> float:
    """Mean x index of a label value; grows to the patient's left."""
    return float(np.average(np.arange(label.shape[2]), weights=(label == value).sum(axis=(0, 1))))


def _fault(
    manifest: Manifest, case: CaseEntry, field: str, found: str, expected: str, remedy: str, refused: bool = True
) -> Fault:
    return Fault(case.id, _relative(manifest, case), field, found, expected, remedy, refused)


def _relative(manifest: Manifest, case: CaseEntry) -> str:
    """The label's path below the root, or the image's where there is no label."""
    return str((case.label or case.image).relative_to(manifest.root))


@dataclass(frozen=True)
class Finding:
    """What `check` found in one case."""

    dataset: str
    case: str
    faults: tuple[Fault, ...]
    voxels: tuple[int, ...]
    """Of each of the manifest's organs; empty where the case was refused."""
    image_sha256: str


def check_case(manifest: Manifest, case: CaseEntry) -> Finding:
    """Examine one case and keep what is worth telling."""
    try:
        examined = examine(manifest, case)
    except InputError as error:
        return Finding(manifest.name, case.id, error.faults, (), "")
    counts = value_counts(examined.label)[1 : len(manifest.organs) + 1]
    return Finding(manifest.name, case.id, examined.warnings, tuple(counts.tolist()), examined.image_sha256)


def check(manifest: Manifest, processes: int) -> Iterator[Finding]:
    """Examine all cases in parallel, in order, and find images that are there twice."""
    first: dict[str, str] = {}
    for finding in in_processes(partial(check_case, manifest), manifest.cases, processes):
        twin = first.setdefault(finding.image_sha256, finding.case) if finding.image_sha256 else finding.case
        if twin != finding.case:
            entry = next(case for case in manifest.cases if case.id == finding.case)
            fault = Fault(
                finding.case, str(entry.image.relative_to(manifest.root)), "image", f"the same file as case {twin}",
                "an image once", "give both the same `patient`, or drop one", refused=False,
            )  # fmt: skip
            finding = Finding(
                finding.dataset, finding.case, (*finding.faults, fault), finding.voxels, finding.image_sha256
            )
        yield finding
