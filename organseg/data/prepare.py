"""From files to the cache: one case at a time, in parallel, atomically; what is current is skipped.

A prepared case is current when the sha256 of its source files, the organs, annotations and options are those of its
header. Any number of preparers may work on one cache at once: each publishes whole files, and equal input gives equal
bytes.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from organseg.data.cache import CachedCase, CaseArrays, CaseHeader, NewerSchemaError, write_case
from organseg.data.check import examine
from organseg.data.cohort import read_digests, write_index
from organseg.data.fingerprint import write_fingerprint
from organseg.data.manifest import CaseEntry, Manifest
from organseg.data.shards import Shard, forget_shards, record_shard
from organseg.errors import Fault, InputError, IntegrityError, StorageError, UsageError
from organseg.files import reap_stale, remove, sha256_of
from organseg.processes import in_processes
from organseg.volumes import MAX_AXIS, MAX_VOXELS, WorkingGrid, resample_image, resample_label, spacing_of, spacing_on


@dataclass(frozen=True)
class Prepared:
    """What became of one case: its content hash, or the faults for which it was refused."""

    case: str
    digest: str
    skipped: bool
    faults: tuple[Fault, ...]


def prepare(
    manifest: Manifest,
    cache: Path,
    grid: WorkingGrid,
    processes: int,
    shard: Shard = Shard(),  # noqa: B008 - frozen
) -> Iterator[Prepared]:
    """Prepare the cases of a data set; the index that marks it complete is written after the last one.

    Args:
        manifest: The data set.
        cache: Folder of the cache; the data set gets a folder of its name in it.
        grid: Where networks will see the scans.
        processes: Worker processes.
        shard: Which of its cases; the last shard to end writes the index.

    Yields:
        What became of each case, in order.

    Raises:
        StorageError: If the cache cannot be written; before anything is decoded where that is known.
        UsageError: If another data set of the same name is there.
    """
    folder = cache / manifest.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made: {error.strerror}; choose another --out") from error
    if not os.access(folder, os.W_OK):
        raise StorageError(f"{folder}: cannot be written: no permission, or read-only; choose another --out")
    _refuse_namesake(manifest, folder)
    reap_stale(folder)
    remove(folder / f"{shard.name}.json")
    digests: dict[str, str] = {}
    for prepared in in_processes(partial(prepare_case, manifest, folder, grid), shard.of(manifest.cases), processes):
        if prepared.digest:
            digests[prepared.case] = prepared.digest
        yield prepared
    if shard.count > 1:
        made_of = [[case.id, _identity(manifest, case, grid)] for case in manifest.cases]
        complete = record_shard(folder, shard, made_of, digests)
        if complete is None or any(not (folder / f"{name}.h5").exists() for name in complete):
            return  # another shard is still to end, or is at work again
        digests = complete
    else:
        forget_shards(folder)
    write_fingerprint(folder, [CachedCase(folder / f"{name}.h5") for name in sorted(digests)])
    write_index(folder, digests)


def _refuse_namesake(manifest: Manifest, folder: Path) -> None:
    """Refuse to replace another data set of the same name.

    Raises:
        UsageError: If one is prepared there, and no case is in both.
    """
    try:
        there = set(read_digests(folder))
    except IntegrityError:
        return  # nothing complete is there
    if there and there.isdisjoint(case.id for case in manifest.cases):
        raise UsageError(
            f"{folder}: another data set named {manifest.name!r} is prepared here, with other cases "
            f"({', '.join(sorted(there)[:3])} ...): give one of the two another `name`, or remove the folder"
        )


def prepare_case(manifest: Manifest, folder: Path, grid: WorkingGrid, case: CaseEntry) -> Prepared:
    """Prepare one case, unless it is current."""
    path = folder / f"{case.id}.h5"
    try:
        current = _current(path, manifest, case, grid)
        if current:
            return Prepared(case.id, current, True, ())
        examined = examine(manifest, case)
    except InputError as error:
        # An old file of a case that is refused now must not be trained on.
        remove(path)
        return Prepared(case.id, "", False, error.faults)
    image, label = examined.image, examined.label
    shape = grid.shape(image.shape, image.spacing)
    if max(shape) > MAX_AXIS or math.prod(shape) > MAX_VOXELS:
        remove(path)
        expected = f"at most {MAX_AXIS} an axis and {MAX_VOXELS} voxels"
        found = " x ".join(map(str, shape))
        remedy = "set a coarser --spacing (mm) or a smaller --size"
        return Prepared(case.id, "", False, (Fault(case.id, case.image.name, "working grid", found, expected, remedy),))
    resampled = shape != image.shape
    header = CaseHeader(
        key=f"{manifest.name}/{case.id}",
        spacing=spacing_on(shape, image.shape, image.spacing),
        affine=tuple(tuple(float(value) for value in row) for row in image.affine),
        source_shape=image.shape,
        source_spacing=spacing_of(image.affine),
        image_sha256=examined.image_sha256,
        label_sha256=examined.label_sha256,
        **_identity(manifest, case, grid),
    )
    arrays = CaseArrays(
        image=np.ascontiguousarray(resample_image(image.array, shape) if resampled else image.array),
        label=np.ascontiguousarray(resample_label(label, shape) if resampled else label),
        source_label=np.ascontiguousarray(label) if resampled else None,
    )
    write_case(path, header, arrays)
    return Prepared(case.id, CachedCase(path).digest, False, examined.warnings)


def _identity(manifest: Manifest, case: CaseEntry, grid: WorkingGrid) -> dict[str, Any]:
    """The part of a header that the manifest and the options decide."""
    options: dict[str, Any] = {}
    if grid.size is not None:
        options["size"] = grid.size
    if grid.spacing is not None:
        options["spacing"] = grid.spacing
    return {
        "patient": manifest.patient_of(case),
        "modality": manifest.modality,
        "organs": manifest.organs,
        "annotated": tuple(organ for organ in manifest.organs if organ in case.annotated),
        "preprocessing": options,
        "reading": {
            "labels": {str(value): organ for value, organ in sorted(manifest.labels.items())},
            "hidden": tuple(sorted(case.hidden)),
            "affine": manifest.affine,
            "assume_affine": manifest.assume_affine,
        },
    }


def _current(path: Path, manifest: Manifest, case: CaseEntry, grid: WorkingGrid) -> str:
    """The digest of an existing file that preparing again would reproduce, else ""."""
    if not path.exists():
        return ""
    cached = CachedCase(path)
    try:
        header, digest = cached.header, cached.digest
    except NewerSchemaError:
        raise
    except IntegrityError:
        return ""
    try:
        if not all(source.is_file() for source in (case.image, case.label) if source):
            return ""  # a FIFO would be waited for
        sources = (sha256_of(case.image), sha256_of(case.label) if case.label else "")
    except OSError:
        return ""  # what is wrong with it is told on reading
    identity = _identity(manifest, case, grid)
    same = all(getattr(header, name) == value for name, value in identity.items())
    return digest if same and sources == (header.image_sha256, header.label_sha256) else ""
