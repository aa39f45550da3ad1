"""A cache on the node's own disk: copied once a node before it is read, behind a lock, and verified (FAULTS.md 2).

Every process of a node asks for it. One copies what is missing or different, the others wait, and all read the copy as
they would the cache, every byte against the shared index. Copies are atomic and the index comes last, so that a killed
copying goes on, and nodes that share the folder by mistake lose time and nothing else.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from organseg.data.cache import CASE, CachedCase, case_files
from organseg.data.cohort import Cohort, CohortOptions, datasets_of, load_cohort, read_digests, write_index
from organseg.errors import IntegrityError, StorageError, UsageError
from organseg.files import publish, reap_stale

REPORT_S = 10.0
"""Seconds between two lines on progress."""

_POLL_S = 0.1


@dataclass(frozen=True)
class _Copy:
    """One case to copy."""

    source: Path
    target: Path
    digest: str
    size: int


def load_staged(options: CohortOptions, folder: Path) -> Cohort:
    """`load_cohort` from a copy of the data sets that it needs.

    Args:
        options: With the shared cache.
        folder: On a local disk; each cache gets a folder of its own in it.

    Raises:
        UsageError: As `load_cohort`; also if the folder is the cache or lies in it.
        IntegrityError: As `load_cohort`; also if a case of the shared cache is damaged.
        StorageError: If there is no room for the copy, or it cannot be written.
    """
    learned, held = datasets_of(options)
    local = place_of(options.cache, folder)
    here = replace(options, cache=local, datasets=learned)
    stage(options.cache, local, [*learned, *held])
    try:
        return load_cohort(here)
    except IntegrityError:
        # Bytes rot, and another run may have brought a changed cache meanwhile: look at all of them, and only then.
        stage(options.cache, local, [*learned, *held], thorough=True)
        return load_cohort(here)


def place_of(cache: Path, folder: Path) -> Path:
    """Where in a folder the copy of a cache lies.

    Raises:
        UsageError: If the folder is the cache, or lies in it.
    """
    shared = cache.resolve()
    place = folder.resolve()
    if shared in (place, *place.parents):
        raise UsageError(
            f"data.init_args.stage: {folder} is the cache {cache} or lies in it; give a folder on the node's own disk, "
            "or null"
        )
    return place / f"{shared.name[:40]}-{hashlib.sha256(os.fsencode(shared)).hexdigest()[:16]}"


def stage(cache: Path, local: Path, names: Sequence[str], thorough: bool = False) -> None:
    """Make a copy of prepared data sets current.

    Args:
        cache: The shared cache.
        local: Its copy, see `place_of`.
        names: The data sets.
        thorough: Compare every byte of what is there; else a file counts as the one whose content hash it begins with.

    Raises:
        IntegrityError: If an index or a case of the shared cache is damaged; what was copied before stays.
        StorageError: If there is no room for the copy, or it cannot be written.
    """
    for folder in (local, *(local / name for name in names)):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be made: {error.strerror}; choose another `stage`, or null"
            ) from error
    with _locked(local / ".lock"):
        indices = {name: read_digests(cache / name) for name in names}
        copies: list[_Copy] = []
        for name, digests in indices.items():
            reap_stale(local / name)
            copies += _outdated(cache / name, local / name, digests, thorough)
        _refuse_without_room(copies, cache, local)
        _copy_all(copies, sum(map(len, indices.values())), local)
        for name, digests in indices.items():
            _finish(local / name, digests)


def _outdated(source: Path, target: Path, digests: Mapping[str, str], thorough: bool) -> Iterator[_Copy]:
    """The cases of a data set that are missing in the copy, or different."""
    for case, digest in digests.items():
        here, there = target / f"{case}.h5", source / f"{case}.h5"
        if not (_is_intact(here, digest) if thorough else _begins_with(here, digest)):
            # A source that is missing is named when its turn comes.
            yield _Copy(there, here, digest, there.stat().st_size if there.exists() else 0)


def _begins_with(path: Path, digest: str) -> bool:
    wanted = CASE.magic + digest.encode() + b"\n"
    try:
        with path.open("rb") as file:
            return file.read(len(wanted)) == wanted
    except OSError:
        return False


def _is_intact(path: Path, digest: str) -> bool:
    try:
        return CachedCase(path).digest == digest
    except IntegrityError:
        return False


def _refuse_without_room(copies: Sequence[_Copy], cache: Path, local: Path) -> None:
    needed, free = sum(copy.size for copy in copies), shutil.disk_usage(local).free
    if needed > free:
        raise StorageError(
            f"{local}: no room for {len(copies)} cases of {cache}: {needed} bytes ({_words(needed)}) needed, "
            f"{free} bytes ({_words(free)}) free; free space, choose another `stage`, name fewer `datasets`, or read "
            "the cache where it is (null)"
        )


def _copy_all(copies: Sequence[_Copy], cases: int, local: Path) -> None:
    done, said = 0, time.monotonic()
    for number, copy in enumerate(copies, start=1):
        _copy(copy)
        done += copy.size
        if number == len(copies) or time.monotonic() - said > REPORT_S:
            said = time.monotonic()
            rest = "" if len(copies) == cases else f" ({cases - len(copies)} were there)"
            print(f"staged {number} of {len(copies)} cases{rest}, {_words(done)}, to {local}", flush=True)


def _copy(copy: _Copy) -> None:
    """Copy one verified case.

    Raises:
        IntegrityError: If it is damaged, or not the one that the index names.
        StorageError: If it cannot be written.
    """
    _ = CachedCase(copy.source).digest
    try:
        content = copy.source.read_bytes()
    except OSError as error:
        raise CASE.broken(copy.source, error.strerror or str(error), "a readable case file") from error
    if not content.startswith(CASE.magic + copy.digest.encode()):
        raise IntegrityError(
            f"{copy.source.parent.name}/{copy.source.stem}: {copy.source}: changed since the last complete "
            "preparation; run `organseg prepare` again"
        )

    def write(file: BinaryIO) -> None:
        file.write(content)

    publish(copy.target, write)


def _finish(folder: Path, digests: Mapping[str, str]) -> None:
    """Publish the index where it is another one, and remove what it does not name."""
    try:
        current = read_digests(folder) == digests
    except IntegrityError:
        current = False
    if not current:
        write_index(folder, dict(digests))
    for path in case_files(folder):
        if path.stem not in digests:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that a process loses when it ends, however it ends; waits for whoever holds it.

    Raises:
        StorageError: If the file cannot be made.
    """
    try:
        # A record lock: children do not inherit it.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}; choose another `stage`, or null") from error
    with file:
        said = time.monotonic()
        while _is_held(file):
            if time.monotonic() - said > REPORT_S:
                said = time.monotonic()
                print(f"waiting for the process that copies the cache to {path.parent}", flush=True)
            time.sleep(_POLL_S)
        yield


def _is_held(file: BinaryIO) -> bool:
    """Whether another process holds the lock; if not, this one does from now on."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False  # a file system without locks: whole files are published all the same
    return False


def _words(size: int) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
