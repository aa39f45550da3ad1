"""Bytes of a .nii or .nii.gz, read front to back, and never trusted (FAULTS.md section 3, rows on files and gzip).

nibabel stops reading a gzip stream where the voxels end, so that a wrong checksum, a cut file or appended junk pass
unseen. Here the whole stream is read, each member's CRC and length are checked, and nothing may follow.
"""

import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from organseg.volumes.findings import Findings

_CHUNK = 1 << 18
_GZIP = b"\x1f\x8b"
_MAX_RATIO = 1040  # deflate cannot shrink more than 1032 : 1, so a header that declares more lies


class ByteStream:
    """Reads a file, or what its gzip stream holds; every damage ends in an InputError.

    Attributes:
        ceiling: More bytes than the file can possibly hold: a cheap test of a header before memory is taken for it.
    """

    def __init__(self, descriptor: int, size: int, gzipped: bool, findings: Findings) -> None:
        self.ceiling = size * _MAX_RATIO if gzipped else size
        self._descriptor = descriptor
        self._findings = findings
        self._inflate = zlib.decompressobj(31) if gzipped else None  # 31: gzip framing, CRC and length are checked
        self._pending = b""

    def read_into(self, view: memoryview, what: str) -> None:
        """Fill a buffer wholly; `what` names its content for the user.

        Raises:
            InputError: The file is shorter, or damaged.
        """
        filled = self._fill(view)
        if filled < len(view):
            self._stop("length", f"{filled} of {len(view)} bytes of {what}", "a complete file")

    def skip(self, count: int, what: str) -> None:
        """Read and drop `count` bytes; raises like `read_into`."""
        scratch = memoryview(bytearray(min(count, _CHUNK)))
        while count:
            part = scratch[: min(count, len(scratch))]
            self.read_into(part, what)
            count -= len(part)

    def finish(self) -> None:
        """Read to the very end.

        Raises:
            InputError: Bytes follow, or a checksum is wrong.
        """
        if self._fill(memoryview(bytearray(1))):
            self._stop("length", "more bytes than the header declares", "the file to end after its last voxel")

    def _fill(self, view: memoryview) -> int:
        try:
            return self._fill_plain(view) if self._inflate is None else self._fill_inflated(view)
        except zlib.error as error:
            self._stop(
                "gzip", f"damaged data ({str(error).rpartition(': ')[2]})", "an intact stream with a matching CRC"
            )
        except OSError as error:
            self._stop("file", f"unreadable ({error.strerror or error})", "a readable file")
        return 0

    def _fill_plain(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view) and (count := os.readv(self._descriptor, [view[filled:]])):
            filled += count
        return filled

    def _fill_inflated(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view) and self._next_member():
            assert self._inflate is not None
            self._pending = self._pending or os.read(self._descriptor, _CHUNK)
            ended = not self._pending
            part = self._inflate.decompress(self._pending, min(len(view) - filled, 1 << 22))
            self._pending = self._inflate.unconsumed_tail
            view[filled : filled + len(part)] = part
            filled += len(part)
            # With no input left zlib may still hold output back; only when that too is empty the stream is cut.
            if ended and not part and not self._inflate.eof:
                self._stop("gzip", "a stream that is cut off", "a complete gzip file")
        return filled

    def _next_member(self) -> bool:
        """False at the end of the file; several members in a row are legal (bgzip, pigz)."""
        assert self._inflate is not None
        if not self._inflate.eof:
            return True
        rest = self._inflate.unused_data or os.read(self._descriptor, _CHUNK)
        if not rest:
            return False
        if len(rest) < 2:
            rest += os.read(self._descriptor, _CHUNK)
        if not rest.startswith(_GZIP):
            self._stop("gzip", "junk after the compressed data", "nothing after it")
        self._inflate, self._pending = zlib.decompressobj(31), rest
        return True

    def _stop(self, field: str, found: str, expected: str) -> None:
        self._findings.refuse(field, found, expected, "copy or download the file again, or export it anew")
        raise self._findings.error()


@contextmanager
def open_stream(path: Path, findings: Findings) -> Iterator[ByteStream]:
    """Open a NIfTI file by its name's ending, or refuse it.

    Raises:
        InputError: Missing, unreadable, not a regular file (a FIFO is not waited for), empty, or no .nii or .nii.gz.
    """
    gzipped = _is_gzip_name(path, findings)
    try:
        # Without O_NONBLOCK, opening a FIFO that nobody writes to hangs for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        findings.refuse("file", "nothing under this name", "an existing file", "correct the path in the manifest")
        raise findings.error() from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        findings.refuse("file", f"unreadable ({reason})", "a readable file", "correct the file's name or permissions")
        raise findings.error() from None
    try:
        size = _regular_size(os.fstat(descriptor), findings)
        if (os.pread(descriptor, 2, 0) == _GZIP) != gzipped:
            found = "no gzip data" if gzipped else "gzip data"
            remedy = "drop '.gz' from the name" if gzipped else "add '.gz' to the name"
            findings.refuse("file name", found, "gzip data if and only if the name ends in .gz", remedy)
            raise findings.error()
        yield ByteStream(descriptor, size, gzipped, findings)
    except MemoryError:
        findings.refuse("dim", "more voxels than the memory can hold", "a smaller scan", "crop or resample it")
        raise findings.error() from None
    finally:
        os.close(descriptor)


def _is_gzip_name(path: Path, findings: Findings) -> bool:
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        pair = name.endswith((".hdr", ".img", ".hdr.gz", ".img.gz"))
        found = "a .hdr/.img pair" if pair else f"the ending '{''.join(path.suffixes[-2:])}'"
        remedy = "convert it to one .nii.gz file" + (", e.g. nibabel.save(nibabel.load(x), 'x.nii.gz')" if pair else "")
        findings.refuse("file name", found, ".nii or .nii.gz", remedy)
        raise findings.error()
    return name.endswith(".gz")


def _regular_size(status: os.stat_result, findings: Findings) -> int:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO"}
        found = kinds.get(stat.S_IFMT(status.st_mode), "a special file")
        findings.refuse("file", found, "a regular file", "name the NIfTI file itself")
        raise findings.error()
    if status.st_size == 0:
        findings.refuse("file", "0 bytes", "a NIfTI file", "copy or download the file again")
        raise findings.error()
    return status.st_size
