"""Publishing files: what appears under its name is wholly old or wholly new, whatever kills the process.

Implements FAULTS.md section 1, promise 1, for every room that writes. The bytes go to a temporary name in the same
folder (a rename across devices is a copy, not an atomic step), reach the disk, and only then take the name.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from organseg.errors import StorageError

_OWNER = re.compile(r"\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.(?P<start>\d+)\.[0-9a-f]{8}\.tmp$")


def publish(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file atomically and durably; an existing one is replaced.

    The file is made with mode 0600. On any failure, also of `write`, the temporary file is removed and what lay under
    `path` is untouched.

    Args:
        path: The final name; its folder must exist.
        write: Puts the content into a binary file open for writing and reading; it need not close or flush it.

    Raises:
        StorageError: The disk is full, or the place cannot be written (any OSError on the way).
    """
    temporary = path.parent / _temporary_name(path.name)
    try:
        try:
            with os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}; free space or choose another folder"
        ) from error


def publish_text(path: Path, text: str) -> None:
    """`publish` of a text, as UTF-8."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    publish(path, write)


def publish_link(source: Path, target: Path) -> None:
    """Give a published file a second name, atomically; what lay under `target` is replaced.

    Without copying, but where the file system knows no second names (exFAT, SMB, object stores).

    Raises:
        StorageError: The place cannot be written.
    """
    temporary = target.parent / _temporary_name(target.name)
    try:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            _publish_copy(source, target)
            return
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{target}: cannot be linked to {source.name}: {error.strerror or error}") from error


def _publish_copy(source: Path, target: Path) -> None:
    def write(file: BinaryIO) -> None:
        with source.open("rb") as content:
            shutil.copyfileobj(content, file)

    publish(target, write)


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        StorageError: It cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error.strerror or error}") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits; OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_if_readable(path: Path) -> str:
    """`sha256_of` a file; "" where there is none that can be read, for who is told that on reading it."""
    try:
        return sha256_of(path) if path.is_file() else ""  # a FIFO would be waited for
    except OSError:
        return ""


def reap_stale(folder: Path) -> list[Path]:
    """Remove the temporary files that dead processes of this host left in a folder.

    Files of other hosts stay, since whether their owners live cannot be known from here.

    Args:
        folder: Searched itself, not below.

    Returns:
        What was removed, sorted.

    Raises:
        StorageError: The folder cannot be read, or a stale file not removed.
    """
    removed = []
    try:
        for path in sorted(folder.glob(".*.tmp")):
            owner = _OWNER.search(path.name)
            if owner is None or owner["host"] != _host() or _start_of(int(owner["pid"])) == int(owner["start"]):
                continue
            path.unlink(missing_ok=True)
            removed.append(path)
    except OSError as error:
        raise StorageError(f"{folder}: stale temporary files cannot be removed: {error.strerror or error}") from error
    return removed


def _temporary_name(name: str) -> str:
    # The start time beside the pid: a restarted container gets the same host and pid, yet its old files are stale.
    # The token: two threads may publish the same name. Names stay below the 255 bytes of common file systems.
    stem = name.encode()[:80].decode(errors="ignore")
    return f".{stem}.{_host()}.{os.getpid()}.{_start_of(os.getpid())}.{secrets.token_hex(4)}.tmp"


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:64] or "host"


def _start_of(pid: int) -> int:
    """Start time of a living process in clock ticks since boot, 0 where the system does not tell, -1 when dead."""
    try:
        # The command's name, in brackets, may hold blanks and brackets: count the fields after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        return 0
    return 0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)
