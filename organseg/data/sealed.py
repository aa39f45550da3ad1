"""Sealed HDF5 files: immutable once published, and verified before anything of them is believed (FAULTS.md 2).

A 512-byte user block holds a magic line and the digest of all bytes behind it, then comes HDF5: plain arrays and one
JSON attribute `header`. The digest over the raw bytes finds every flipped bit and every truncation before libhdf5 sees
the file, whatever the filter. Chunks are (1, 128, 128) with bitshuffle + lz4: a slice or a patch reads little else.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import hdf5plugin
from h5py import File as SealedFile
from numpy.typing import NDArray

from organseg.errors import IntegrityError
from organseg.files import publish

__all__ = [
    "Kind",
    "PlaneReader",
    "SealedFile",
    "file_state",
    "open_sealed",
    "opened",
    "read_header",
    "require_digest",
    "verify_sealed",
    "write_sealed",
]

_BLOCK = 512
_CHUNK = (1, 128, 128)
_HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError)  # what h5py makes of libhdf5's
_FILTER = hdf5plugin.Bitshuffle.filter_id
_MAX_RATIO = 1000  # lz4 cannot shrink more than 255 : 1, so an array that claims to be larger lies


@dataclass(frozen=True)
class Kind:
    """What a sealed file holds.

    Attributes:
        magic: First bytes of the file, with a newline at their end.
        what: Words for error messages.
        remedy: What to do about a broken one.
        required: Names of the arrays.
        optional: Names of arrays that may be there.
    """

    magic: bytes
    what: str
    remedy: str
    required: frozenset[str]
    optional: frozenset[str] = field(default_factory=frozenset)

    def broken(self, path: Path, found: str, expected: str) -> IntegrityError:
        """The error that names the case, the file, what is wrong and the remedy."""
        case = f"{path.parent.name}/{path.stem}"
        return IntegrityError(f"{case}: {path}: found {found}, expected {expected}; {self.remedy}")


def write_sealed(
    path: Path,
    kind: Kind,
    header: Mapping[str, Any],
    volumes: Mapping[str, NDArray[Any]],
    tables: Mapping[str, NDArray[Any]],
) -> None:
    """Publish a file atomically; volumes [Z, Y, X] are compressed slice by slice, tables are not.

    Raises:
        StorageError: If it cannot be written; what lay there is intact.
    """
    buffer = BytesIO()
    with h5py.File(buffer, "w", userblock_size=_BLOCK) as file:
        file.attrs["header"] = json.dumps(header, sort_keys=True)
        for name, volume in volumes.items():
            chunks = tuple(min(c, n) for c, n in zip(_CHUNK, volume.shape, strict=True))
            file.create_dataset(name, data=volume, chunks=chunks, **hdf5plugin.Bitshuffle(cname="lz4"))
        for name, table in tables.items():
            file[name] = table
    content = buffer.getbuffer()[_BLOCK:]
    block = _block(kind, content)

    def write(target: BinaryIO) -> None:
        target.write(block)
        target.write(content)

    publish(path, write)


def _block(kind: Kind, content: memoryview | bytes) -> bytes:
    digest = hashlib.blake2b(content, digest_size=32).hexdigest()
    return (kind.magic + digest.encode() + b"\n").ljust(_BLOCK, b"\0")


def verify_sealed(path: Path, kind: Kind) -> str:
    """The content hash, checked against every byte of the file.

    Raises:
        IntegrityError: If the file is missing, damaged, or of another kind.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise kind.broken(path, error.strerror or str(error), f"a readable {kind.what} file") from error
    head, body = content[:_BLOCK], memoryview(content)[_BLOCK:]
    if not head.startswith(kind.magic):
        raise kind.broken(path, f"no organseg {kind.what}", f"one that begins with {kind.magic!r}")
    if head != _block(kind, body):
        raise kind.broken(path, "bytes that do not match their content hash", "an undamaged file")
    return head[len(kind.magic) :].split(b"\n")[0].decode()


def require_digest(path: Path, kind: Kind, digest: str) -> None:
    """Verify that a file is the one with this content hash.

    Raises:
        IntegrityError: If it is missing, damaged or another one.
    """
    if verify_sealed(path, kind) != digest:
        raise kind.broken(path, f"another {kind.what} than when it was first read", "files that stay as they are")


def open_sealed(path: Path, kind: Kind) -> SealedFile:
    """Open a file whose digest was checked: whoever can write one can also make a right digest.

    Raises:
        IntegrityError: If the file is no HDF5, or holds anything but the plain arrays of its kind.
    """
    try:
        file = h5py.File(path, "r", locking=False)
        known = kind.required | kind.optional
        strange = sorted(name for name in file if name not in known or not _is_plain(file, name))
        missing = sorted(kind.required - set(file))
    except _HDF5_ERRORS as error:
        raise kind.broken(path, f"no HDF5 ({error!s:.80})", f"a {kind.what}") from error
    if strange or missing:
        file.close()
        raise kind.broken(path, f"strange {strange} and missing {missing}", f"the plain arrays of a {kind.what}")
    return file


@contextmanager
def opened(path: Path, kind: Kind) -> Iterator[SealedFile]:
    """`open_sealed` for a while; errors of libhdf5 become `IntegrityError`."""
    with open_sealed(path, kind) as file:
        try:
            yield file
        except _HDF5_ERRORS as error:
            raise kind.broken(path, f"unreadable HDF5 ({error!s:.80})", f"a {kind.what}") from error


def read_header(file: SealedFile) -> dict[str, Any]:
    """The JSON header, lists as tuples.

    Raises:
        ValueError: If there is none.
    """
    try:
        header: dict[str, Any] = _tuples(json.loads(str(file.attrs["header"])))
        return header
    except (KeyError, TypeError) as error:
        raise ValueError(repr(error)) from error


def _is_plain(file: h5py.File, name: str) -> bool:
    """An array of numbers in this file: no link or storage elsewhere, no foreign filter, no size it cannot have."""
    dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        return False
    options = dataset.id.get_create_plist()
    filters = [options.get_filter(i)[0] for i in range(options.get_nfilters())]
    plain = dataset.dtype.kind in "iuf" and filters in ([], [_FILTER])
    return bool(plain and dataset.nbytes <= _MAX_RATIO * dataset.id.get_storage_size())


def _tuples(value: Any) -> Any:
    """JSON lists back to tuples, at any depth."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def file_state(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class PlaneReader:
    """Reads slices and boxes of many sealed files through a bounded set of open ones, safely across forks.

    Args:
        paths: The files.
        digests: Their content hashes: a file that was replaced by another one is refused.
        kind: Theirs.
        names: The volumes whose slices are wanted.
        max_open: Files that are open at a time.
    """

    def __init__(
        self, paths: Sequence[Path], digests: Sequence[str], kind: Kind, names: Sequence[str], max_open: int = 64
    ) -> None:
        self.paths = list(paths)
        self.digests = list(digests)
        self.kind = kind
        self.names = tuple(names)
        self.max_open = max_open
        self._files: OrderedDict[int, tuple[SealedFile, list[h5py.Dataset]]] = OrderedDict()
        self._verified: dict[int, tuple[int, ...] | None] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_pid": -1}

    def planes(self, number: int, z: int) -> list[NDArray[Any]]:
        """Slice z of each named volume of a file, [Y, X]."""
        return [volume[z] for volume in self._volumes(number)]

    def boxes(self, number: int, box: NDArray[Any]) -> list[NDArray[Any]]:
        """The part [lo, hi) of each named volume of a file; `box` is [3, 2] (z, y, x), the result [Z, Y, X]."""
        part = tuple(slice(int(low), int(high)) for low, high in box)
        return [volume[part] for volume in self._volumes(number)]

    def _volumes(self, number: int) -> list[h5py.Dataset]:
        if self._pid != os.getpid():
            # A forked child shares file offsets and library state with its parent: it opens its own.
            self._files, self._pid = OrderedDict(), os.getpid()
        if number not in self._files:
            path = self.paths[number]
            state = file_state(path)
            if state is None or state != self._verified.get(number):
                require_digest(path, self.kind, self.digests[number])
                self._verified[number] = state  # to read all of it whenever it is opened again would cost far more
            file = open_sealed(path, self.kind)
            self._files[number] = (file, [file[name] for name in self.names])
            if len(self._files) > self.max_open:
                self._files.popitem(last=False)[1][0].close()
        self._files.move_to_end(number)
        return self._files[number][1]
