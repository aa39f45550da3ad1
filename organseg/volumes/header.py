"""The header of a single-file NIfTI-1 or -2, checked before any memory is taken for its voxels (FAULTS.md section 3).

nibabel parses the fields; what it repairs or ignores in silence (slope 0, NaN or Inf, a data offset inside the header,
voxel sizes of 0) is judged here.
"""

import math
from dataclasses import dataclass

import nibabel
import numpy as np

from organseg.volumes.findings import Findings
from organseg.volumes.geometry import AffineSource, RawHeader, choose_affine
from organseg.volumes.stream import ByteStream

MAX_AXIS = 4096
MAX_VOXELS = 2**31
_MAX_EXTENSION = 16 * 2**20
_KINDS = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_OTHER_KINDS = {
    0: "unknown", 1: "binary", 32: "complex64", 128: "RGB", 1536: "float128", 1792: "complex128", 2048: "complex256",
    2304: "RGBA",
}  # fmt: skip
_REMEDY = "convert the scan anew"


@dataclass(frozen=True)
class Header:
    """What is needed to read the voxels.

    Attributes:
        shape: [X, Y, Z] in the file's axis order.
        dtype: Of the stored values, in the file's byte order.
        slope: Stored value x slope + inter = value; 1 where the file is unscaled.
        inter: See slope.
        affine: 4 x 4 float64, voxel (x, y, z) -> world RAS, mm; None where it was refused.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    slope: float
    inter: float
    affine: np.ndarray | None

    @property
    def unscaled(self) -> bool:
        """True where the stored values are the values."""
        return self.slope == 1 and self.inter == 0


def read_header(stream: ByteStream, findings: Findings, source: AffineSource | None, assume: bool) -> Header:
    """Read and judge a header, and leave the stream at the first voxel.

    Args:
        stream: At its beginning.
        findings: Takes all faults; a refused affine alone does not stop, so that the voxels can still be judged.
        source: As for `choose_affine`.
        assume: As for `choose_affine`.

    Raises:
        InputError: The voxels cannot be read.
    """
    fields, size = _parse(stream, findings)
    shape = _shape(fields, findings)
    dtype = _dtype(fields, findings)
    offset = _offset(fields, size, findings)
    slope, inter = _scaling(fields, findings)
    readable = not findings.refused
    affine = choose_affine(fields, shape or (1, 1, 1), findings, source, assume)
    if not readable or shape is None or dtype is None:
        raise findings.error()
    declared = offset + math.prod(shape) * dtype.itemsize
    if declared > stream.ceiling:
        found = f"a file too short for {' x '.join(map(str, shape))} voxels of {dtype.name}"
        findings.refuse("length", found, f"{declared} bytes", "copy or download the file again, or export it anew")
        raise findings.error()
    stream.skip(offset - size, "header extensions")  # dropped: they may name the patient (FAULTS.md section 9)
    return Header(shape, dtype, slope, inter, affine)


def _parse(stream: ByteStream, findings: Findings) -> tuple[RawHeader, int]:
    block = bytearray(540)
    kind: RawHeader
    stream.read_into(memoryview(block)[:4], "the header")
    for kind, size in ((nibabel.Nifti1Header, 348), (nibabel.Nifti2Header, 540)):
        for order, endianness in (("little", "<"), ("big", ">")):
            if int.from_bytes(block[:4], order) == size:  # type: ignore[arg-type]
                stream.read_into(memoryview(block)[4:size], "the header")
                fields = kind(bytes(block[:size]), endianness=endianness, check=False)
                _check_magic(fields, size, findings)
                return fields, size
    findings.refuse("header", "no NIfTI header", "a header size of 348 or 540", "name a NIfTI-1 or NIfTI-2 file")
    raise findings.error()


def _check_magic(fields: RawHeader, size: int, findings: Findings) -> None:
    magic = bytes(fields["magic"])
    # NIfTI-2 goes on with line ends, which a transfer as text damages; old writers left zeros.
    ends = b"" if size == 348 else bytes(fields["eol_check"])
    if magic == (b"n+1\0" if size == 348 else b"n+2\0") and ends in (b"", b"\r\n\x1a\n", bytes(4)):
        return
    found = repr(magic + ends)
    if magic[:3] in (b"ni1", b"ni2"):
        found = "the header of a .hdr/.img pair"
    elif not magic.strip(b"\0"):
        found = "none, as in an Analyze file"
    findings.refuse("magic", found, "n+1 or n+2, a single-file NIfTI", "convert it to one .nii.gz file")
    raise findings.error()


def _shape(fields: RawHeader, findings: Findings) -> tuple[int, int, int] | None:
    dim = [int(value) for value in fields["dim"]]
    axes = dim[1 : 1 + dim[0]] if 0 <= dim[0] <= 7 else []
    found = f"{dim[0]} axes" + (f" of {' x '.join(map(str, axes))}" if axes else "")
    if len(axes) not in (3, 4) or axes[3:] not in ([], [1]):
        findings.refuse("dim", found, "3 axes, or 4 with one frame", "split the file into one 3D scan each")
        return None
    if not all(1 <= axis <= MAX_AXIS for axis in axes) or math.prod(axes) > MAX_VOXELS:
        expected = f"each axis 1 to {MAX_AXIS}, at most {MAX_VOXELS} voxels"
        findings.refuse("dim", found, expected, "crop or resample the scan, or correct the header")
        return None
    if len(axes) == 4:
        findings.warn("dim", found, "3 axes", "the only frame is used")
    return axes[0], axes[1], axes[2]


def _dtype(fields: RawHeader, findings: Findings) -> np.dtype | None:
    code = int(fields["datatype"])
    if code not in _KINDS:
        found = f"{code} ({_OTHER_KINDS.get(code, 'undefined')})"
        findings.refuse(
            "datatype", found, "one real number a voxel, of at most 64 bits", "export one channel as int16 or float32"
        )
        return None
    dtype: np.dtype = np.dtype(fields.endianness + _KINDS[code])
    if int(fields["bitpix"]) != 8 * dtype.itemsize:
        findings.warn(
            "bitpix", str(int(fields["bitpix"])), f"{8 * dtype.itemsize} for {dtype.name}", "datatype is used"
        )
    return dtype


def _offset(fields: RawHeader, size: int, findings: Findings) -> int:
    offset = float(fields["vox_offset"])
    if not (size + 4 <= offset <= size + _MAX_EXTENSION and offset == int(offset)):
        expected = f"a whole number from {size + 4} to {size + _MAX_EXTENSION}"
        findings.refuse("vox_offset", f"{offset:g}", expected, _REMEDY)
        return 0
    return int(offset)


def _scaling(fields: RawHeader, findings: Findings) -> tuple[float, float]:
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0:  # the standard: not scaled, and the intercept is void
        return 1.0, 0.0
    if math.isnan(slope):
        findings.warn("scl_slope", "NaN", "a number", "the stored values are used as they are")
        return 1.0, 0.0
    if math.isinf(slope):
        findings.refuse("scl_slope", f"{slope:g}", "a finite number", _REMEDY)
    if not math.isfinite(inter):
        findings.refuse("scl_inter", f"{inter:g}", "a finite number", _REMEDY)
    return slope, inter
