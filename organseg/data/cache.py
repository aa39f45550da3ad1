"""The cache: one HDF5 file a case, immutable once published, verified before anything of it is believed.

Layout of `CACHE/<data set>/<id>.h5`: a 512-byte user block with a magic line and the digest of all bytes behind it,
then HDF5 with `image` [Z, Y, X] (int16 HU, or float32), `label` [Z, Y, X] uint8, `source_label` (the label on the
file's own grid, where the cached one was resampled), `organ_counts` [Z, K], `organ_boxes` [K, 3, 2], and one JSON
attribute `header`. The digest over the raw bytes finds every flipped bit and every truncation before libhdf5 sees the
file, whatever the filter. Chunks are (1, 128, 128) with bitshuffle + lz4: a slice or a patch reads little else.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from organseg.errors import IntegrityError
from organseg.files import publish

SCHEMA = 1
_BLOCK = 512
_MAGIC = b"organseg case\n"
_CHUNK = (1, 128, 128)
_HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError)  # what h5py makes of libhdf5's
_FILTER = hdf5plugin.Bitshuffle.filter_id
_MAX_RATIO = 1000  # lz4 cannot shrink more than 255 : 1, so an array that claims to be larger lies
_DATASETS = {"image", "label", "source_label", "organ_counts", "organ_boxes"}


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
    buffer = BytesIO()
    with h5py.File(buffer, "w", userblock_size=_BLOCK) as file:
        file.attrs["header"] = json.dumps(asdict(header), sort_keys=True)
        _put(file, "image", arrays.image)
        _put(file, "label", arrays.label)
        if arrays.source_label is not None:
            _put(file, "source_label", arrays.source_label)
        file["organ_counts"] = organ_counts(arrays.label, len(header.organs))
        file["organ_boxes"] = organ_boxes(arrays.label, len(header.organs))
    content = buffer.getbuffer()[_BLOCK:]
    block = (_MAGIC + _digest(content).encode() + b"\n").ljust(_BLOCK, b"\0")

    def write(target: BinaryIO) -> None:
        target.write(block)
        target.write(content)

    publish(path, write)


def _put(file: h5py.File, name: str, array: NDArray[Any]) -> None:
    chunks = tuple(min(c, n) for c, n in zip(_CHUNK, array.shape, strict=True))
    file.create_dataset(name, data=array, chunks=chunks, **hdf5plugin.Bitshuffle(cname="lz4"))


def _digest(content: memoryview | bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()


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
        IntegrityError: On first use, if the file is missing, damaged, of a newer schema, or not such a file at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def digest(self) -> str:
        """The content hash, checked against every byte of the file."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise self._broken(error.strerror or str(error), "a readable case file") from error
        head, body = content[:_BLOCK], memoryview(content)[_BLOCK:]
        expected = (_MAGIC + _digest(body).encode() + b"\n").ljust(_BLOCK, b"\0")
        if not head.startswith(_MAGIC):
            raise self._broken("no organseg case", f"one that begins with {_MAGIC!r}")
        if head != expected:
            raise self._broken("bytes that do not match their content hash", "an undamaged file")
        return head[len(_MAGIC) :].split(b"\n")[0].decode()

    @cached_property
    def header(self) -> CaseHeader:
        """The header, from a verified file."""
        with self._opened() as file:
            try:
                raw = json.loads(str(file.attrs["header"]))
                if raw["schema"] > SCHEMA:
                    newer = f"{self.path}: made by a newer organseg; update this one, or use another cache"
                    raise NewerSchemaError(newer)
                if raw["schema"] < SCHEMA:
                    raise self._broken(f"schema {raw['schema']}", f"schema {SCHEMA}")
                return CaseHeader(**_tuples(raw))
            except (KeyError, ValueError, TypeError) as error:
                raise self._broken(f"no readable header ({error!r:.80})", "that of a case") from error

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
    def _opened(self) -> Iterator[h5py.File]:
        _ = self.digest
        with open_verified(self.path) as file:
            try:
                yield file
            except _HDF5_ERRORS as error:
                raise self._broken(f"unreadable HDF5 ({error!s:.80})", "a case") from error

    def _broken(self, found: str, expected: str) -> IntegrityError:
        return _broken(self.path, found, expected)


def _broken(path: Path, found: str, expected: str) -> IntegrityError:
    case = f"{path.parent.name}/{path.stem}"
    return IntegrityError(f"{case}: {path}: found {found}, expected {expected}; run `organseg prepare` again")


def open_verified(path: Path) -> h5py.File:
    """Open a case whose digest was checked: whoever can write a cache can also make a right digest.

    Raises:
        IntegrityError: If the file is no HDF5, or holds anything but the plain datasets of this layout.
    """
    try:
        file = h5py.File(path, "r", locking=False)
        strange = sorted(name for name in file if name not in _DATASETS or not _is_plain(file, name))
        missing = sorted(_DATASETS - {"source_label"} - set(file))
    except _HDF5_ERRORS as error:
        raise _broken(path, f"no HDF5 ({error!s:.80})", "a case") from error
    if strange or missing:
        file.close()
        raise _broken(path, f"strange {strange} and missing {missing}", "the plain arrays of a case")
    return file


def _is_plain(file: h5py.File, name: str) -> bool:
    """An array of numbers in this file: no link or storage elsewhere, no foreign filter, no size it cannot have."""
    dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        return False
    options = dataset.id.get_create_plist()
    filters = [options.get_filter(i)[0] for i in range(options.get_nfilters())]
    plain = dataset.dtype.kind in "iuf" and filters in ([], [_FILTER])
    return bool(plain and dataset.nbytes <= _MAX_RATIO * dataset.id.get_storage_size())


class SliceReader:
    """Reads single slices of many cases through a bounded set of open files, safely across forks."""

    def __init__(self, paths: Sequence[Path], max_open: int = 64) -> None:
        self.paths = list(paths)
        self.max_open = max_open
        self._files: OrderedDict[int, tuple[h5py.File, h5py.Dataset, h5py.Dataset]] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "max_open": self.max_open, "_files": OrderedDict(), "_pid": -1}

    def read(self, case: int, z: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Image and label [Y, X] of slice z of a case."""
        _, image, label = self._datasets(case)
        return image[z], label[z]

    def _datasets(self, case: int) -> tuple[h5py.File, h5py.Dataset, h5py.Dataset]:
        if self._pid != os.getpid():
            # A forked child shares file offsets and library state with its parent: it opens its own.
            self._files, self._pid = OrderedDict(), os.getpid()
        if case not in self._files:
            _ = CachedCase(self.paths[case]).digest
            file = open_verified(self.paths[case])
            self._files[case] = (file, file["image"], file["label"])
            if len(self._files) > self.max_open:
                self._files.popitem(last=False)[1][0].close()
        self._files.move_to_end(case)
        return self._files[case]


def _tuples(value: Any) -> Any:
    """JSON lists back to tuples, at any depth."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def case_files(folder: Path) -> Iterator[Path]:
    """The published cases of one data set's folder, sorted."""
    return iter(sorted(folder.glob("*.h5")))
