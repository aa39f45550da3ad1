"""The cache: one sealed HDF5 file a case (`sealed.py`), immutable once published.

`CACHE/<data set>/<id>.h5` holds `image` [Z, Y, X] (int16 HU, or float32), `label` [Z, Y, X] uint8, `source_label` (the
label on the file's own grid, where the cached one was resampled), `organ_counts` [Z, K], `organ_boxes` [K, 3, 2].
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organseg.data.sealed import (
    Kind,
    PlaneReader,
    SealedFile,
    file_state,
    opened,
    read_header,
    require_digest,
    verify_sealed,
    write_sealed,
)
from organseg.errors import IntegrityError

SCHEMA = 1
CASE = Kind(
    magic=b"organseg case\n",
    what="case",
    remedy="run `organseg prepare` again",
    required=frozenset({"image", "label", "organ_counts", "organ_boxes"}),
    optional=frozenset({"source_label"}),
)


class NewerSchemaError(IntegrityError):
    """The file was made by a newer version: preparing again would destroy what that version made."""


@dataclass(frozen=True)
class CaseHeader:
    """What is known of a cached case beside its voxels.

    Attributes:
        key: `<data set>/<id>`.
        patient: Who it is.
        modality: CT or MR.
        organs: Organ of label value i + 1.
        annotated: Organs whose truth is known; an annotated organ without voxels is absent.
        spacing: Of the cached image, mm (z, y, x).
        affine: Of the source file, voxel (x, y, z) -> world RAS mm.
        source_shape: [Z, Y, X] of the source, in LPS.
        source_spacing: mm (z, y, x).
        image_sha256: Of the source image file.
        label_sha256: Of the source label file, or "".
        preprocessing: Options of `prepare` that shaped the voxels.
        reading: What the manifest said of the files: integers, hidden organs, affines.
        schema: Version of this layout.
    """

    key: str
    patient: str
    modality: str
    organs: tuple[str, ...]
    annotated: tuple[str, ...]
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]
    source_shape: tuple[int, int, int]
    source_spacing: tuple[float, float, float]
    image_sha256: str
    label_sha256: str
    preprocessing: dict[str, Any]
    reading: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


@dataclass(frozen=True)
class CaseArrays:
    """The voxels of a case, all [Z, Y, X]; `source_label` is None where the label was not resampled."""

    image: NDArray[Any]
    label: NDArray[np.uint8]
    source_label: NDArray[np.uint8] | None


def write_case(path: Path, header: CaseHeader, arrays: CaseArrays) -> None:
    """Publish a case atomically; the digest in the user block is its completion mark."""
    volumes = {"image": arrays.image, "label": arrays.label}
    if arrays.source_label is not None:
        volumes["source_label"] = arrays.source_label
    tables = {
        "organ_counts": organ_counts(arrays.label, len(header.organs)),
        "organ_boxes": organ_boxes(arrays.label, len(header.organs)),
    }
    write_sealed(path, CASE, asdict(header), volumes, tables)


def value_counts(label: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[256] voxels of each value of a label map [Z, Y, X], slice by slice: numpy would count in a copy as int64."""
    counts = np.zeros(256, dtype=np.int64)
    for plane in label:
        counts += np.bincount(plane.ravel(), minlength=256)
    return counts


def organ_counts(label: NDArray[np.uint8], organs: int) -> NDArray[np.int32]:
    """Voxels of each organ in each slice: [Z, Y, X] -> [Z, K]."""
    counts = [np.bincount(plane.ravel(), minlength=256)[1 : organs + 1] for plane in label]
    return np.asarray(counts, dtype=np.int32).reshape(len(label), organs)


def organ_boxes(label: NDArray[np.uint8], organs: int) -> NDArray[np.int32]:
    """Bounding box [lo, hi) of each organ in (z, y, x), zeros where it has no voxel: [Z, Y, X] -> [K, 3, 2]."""
    from scipy.ndimage import find_objects

    boxes = np.zeros((organs, 3, 2), dtype=np.int32)
    for k, box in enumerate(find_objects(np.where(label > organs, 0, label), max_label=organs)):
        if box:
            boxes[k] = [(axis.start, axis.stop) for axis in box]
    return boxes


class CachedCase:
    """A published case, opened lazily in the process that reads it; picklable.

    Raises:
        IntegrityError: On use, if the file is missing, damaged, of a newer schema, not such a file at all, or was
            replaced by another one since it was first used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: tuple[int, ...] | None = None

    @cached_property
    def digest(self) -> str:
        """The content hash, checked against every byte of the file."""
        self._state = file_state(self.path)
        return verify_sealed(self.path, CASE)

    @cached_property
    def header(self) -> CaseHeader:
        """The header, from a verified file."""
        with self._opened() as file:
            try:
                raw = read_header(file)
                if raw["schema"] > SCHEMA:
                    newer = f"{self.path}: made by a newer organseg; update this one, or use another cache"
                    raise NewerSchemaError(newer)
                if raw["schema"] < SCHEMA:
                    raise CASE.broken(self.path, f"schema {raw['schema']}", f"schema {SCHEMA}")
                return CaseHeader(**raw)
            except (KeyError, ValueError, TypeError) as error:
                raise CASE.broken(self.path, f"no readable header ({error!r:.80})", "that of a case") from error

    @cached_property
    def organ_counts(self) -> NDArray[np.int32]:
        """[Z, K] voxels of each of the header's organs in each slice."""
        with self._opened() as file:
            counts: NDArray[np.int32] = file["organ_counts"][()]
            return counts

    @cached_property
    def organ_boxes(self) -> NDArray[np.int32]:
        """[K, 3, 2] bounding boxes [lo, hi) in (z, y, x), zeros where the organ has no voxel."""
        with self._opened() as file:
            boxes: NDArray[np.int32] = file["organ_boxes"][()]
            return boxes

    @property
    def shape(self) -> tuple[int, int, int]:
        """[Z, Y, X] of the cached image."""
        return self._shape

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        with self._opened() as file:
            z, y, x = file["image"].shape
            return (z, y, x)

    def arrays(self) -> CaseArrays:
        """The whole case."""
        with self._opened() as file:
            source = file["source_label"][()] if "source_label" in file else None
            return CaseArrays(file["image"][()], file["label"][()], source)

    def source_label(self) -> NDArray[np.uint8]:
        """The label on the source file's own grid, [Z, Y, X] in LPS."""
        with self._opened() as file:
            label: NDArray[np.uint8] = file["source_label" if "source_label" in file else "label"][()]
            return label

    @contextmanager
    def _opened(self) -> Iterator[SealedFile]:
        digest, state = self.digest, file_state(self.path)
        if state != self._state:  # replaced since it was verified: what is known of it is of another file
            require_digest(self.path, CASE, digest)
            self._state = state
        with opened(self.path, CASE) as file:
            yield file


class SliceReader(PlaneReader):
    """Reads slices and boxes of many cases."""

    def __init__(self, cases: Sequence[CachedCase], max_open: int = 64) -> None:
        digests = [case.digest for case in cases]
        super().__init__([case.path for case in cases], digests, CASE, ("image", "label"), max_open)

    def read(self, case: int, z: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Image and label [Y, X] of slice z of a case."""
        image, label = self.planes(case, z)
        return image, label

    def read_box(self, case: int, box: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Image and label [Z, Y, X] of the part [lo, hi) of a case; `box` is [3, 2] (z, y, x)."""
        image, label = self.boxes(case, box)
        return image, label


def case_files(folder: Path) -> Iterator[Path]:
    """The published cases of one data set's folder, sorted."""
    return iter(sorted(folder.glob("*.h5")))
