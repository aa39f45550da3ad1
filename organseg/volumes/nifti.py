"""NIfTI in and out: the only way a .nii or .nii.gz becomes a Volume, and back (FAULTS.md 3, DESIGN.md 4).

Every malformed file has one of three outcomes: corrected, warned, refused; never another volume in silence. Output has
the input's own grid, and the same input gives the same bytes.
"""

import gzip
import math
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

import nibabel
import numpy as np

from organseg.errors import Fault
from organseg.files import publish
from organseg.volumes.findings import Findings
from organseg.volumes.geometry import AffineSource, RawHeader, difference
from organseg.volumes.header import Header, read_header
from organseg.volumes.orientation import spacing_of, to_file
from organseg.volumes.stream import ByteStream, open_stream
from organseg.volumes.values import ImageSink, LabelSink
from organseg.volumes.volume import Volume

_SLAB_BYTES = 4 * 2**20  # small enough to stay in the processor's cache between its steps


def read_image(
    path: Path,
    *,
    case: str,
    root: Path | None = None,
    affine_source: AffineSource | None = None,
    assume_affine: bool = False,
    modality: str = "CT",
) -> tuple[Volume, list[Fault]]:
    """Read a scan.

    Args:
        path: A .nii or .nii.gz file.
        case: Case id, for the faults.
        root: The input's root; faults name the path below it.
        affine_source: Which affine to use where sform and qform are both set but differ.
        assume_affine: Accept a file without affine: axes left, anterior, superior.
        modality: 'CT': values must be HU. 'MR': any values.

    Returns:
        The scan, [Z, Y, X] contiguous, int16 where all values are whole and fit, else float32; and the warnings.

    Raises:
        InputError: The file is refused, with every fault that could be found at once.
    """
    findings = Findings(case, path, root)
    with open_stream(path, findings) as stream:
        header = read_header(stream, findings, affine_source, assume_affine)
        sink = ImageSink(header, modality, findings)
        _pour(stream, header, sink.put)
    sink.judge()
    warnings, affine = findings.settle(), _known(header)
    return Volume(sink.array, spacing_of(affine), affine), warnings


def read_label(
    path: Path,
    *,
    case: str,
    root: Path | None = None,
    affine_source: AffineSource | None = None,
    assume_affine: bool = False,
) -> tuple[Volume, list[Fault]]:
    """Read a label map: whole numbers 0 to 255, rounded within 1e-3.

    Args and errors as for `read_image`.

    Returns:
        The label map, [Z, Y, X] uint8 contiguous; and the warnings.
    """
    findings = Findings(case, path, root)
    with open_stream(path, findings) as stream:
        header = read_header(stream, findings, affine_source, assume_affine)
        sink = LabelSink(header, findings)
        _pour(stream, header, sink.put)
    sink.judge()
    warnings, affine = findings.settle(), _known(header)
    return Volume(sink.array, spacing_of(affine), affine), warnings


def write_label(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a label map on a file's grid, atomically.

    Args:
        path: .nii or .nii.gz; replaced if it exists.
        array: [Z, Y, X] uint8.
        affine: 4 x 4, the voxel (x, y, z) -> world RAS, mm, of the file whose grid it is (`Volume.affine`).

    Raises:
        StorageError: It cannot be written.
    """
    if array.dtype != np.uint8:
        raise TypeError(f"a label map is uint8, not {array.dtype}")
    _write(path, array, affine, np.dtype("<u1"), 1.0, lambda slab: slab)


def write_map(
    path: Path, array: np.ndarray, affine: np.ndarray, *, dtype: Literal["uint8", "float32"] = "uint8"
) -> None:
    """Write probabilities on a file's grid, atomically.

    Args:
        path: .nii or .nii.gz; replaced if it exists.
        array: [Z, Y, X], float in [0, 1], or uint8 for probabilities already times 255.
        affine: As for `write_label`.
        dtype: 'uint8' stores steps of 1/255, a tenth of the size; 'float32' the values themselves.

    Raises:
        StorageError: It cannot be written.
    """
    if dtype == "float32":
        scale = np.float32(1 / 255) if array.dtype == np.uint8 else np.float32(1)
        _write(path, array, affine, np.dtype("<f4"), 1.0, lambda slab: slab * scale)
    elif array.dtype == np.uint8:
        _write(path, array, affine, np.dtype("<u1"), 1 / 255, lambda slab: slab)
    else:
        _write(
            path,
            array,
            affine,
            np.dtype("<u1"),
            1 / 255,
            lambda slab: np.rint(np.clip(slab.astype(np.float32), 0, 1) * 255),
        )


def write_image(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a scan, e.g. a phantom, atomically.

    Args:
        path: .nii or .nii.gz; replaced if it exists.
        array: [Z, Y, X] int16 or float32.
        affine: As for `write_label`.

    Raises:
        StorageError: It cannot be written.
    """
    if array.dtype not in (np.int16, np.float32):
        raise TypeError(f"an image is int16 or float32, not {array.dtype}")
    _write(path, array, affine, array.dtype.newbyteorder("<"), 1.0, lambda slab: slab)


def _known(header: Header) -> np.ndarray:
    assert header.affine is not None, "a missing affine was refused before"
    return header.affine


def _slices_a_slab(shape: tuple[int, ...], itemsize: int) -> int:
    return max(1, _SLAB_BYTES // (shape[0] * shape[1] * itemsize))


def _pour(stream: ByteStream, header: Header, put: Callable[[int, np.ndarray], None]) -> None:
    x, y, z = header.shape
    step = _slices_a_slab(header.shape, header.dtype.itemsize)
    buffer = bytearray(min(step, z) * x * y * header.dtype.itemsize)
    for start in range(0, z, step):
        count = min(step, z - start)
        view = memoryview(buffer)[: count * x * y * header.dtype.itemsize]
        stream.read_into(view, f"slices {start} to {start + count - 1}")
        put(start, np.frombuffer(view, header.dtype).reshape((x, y, count), order="F"))
    stream.finish()


def _write(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray,
    dtype: np.dtype,
    slope: float,
    encode: Callable[[np.ndarray], np.ndarray],
) -> None:
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: a NIfTI file ends in .nii or .nii.gz")
    voxels = to_file(array, affine)
    header = _header_block(voxels.shape, affine, dtype, slope)
    step = _slices_a_slab(voxels.shape, dtype.itemsize)

    def write_to(file: BinaryIO) -> None:
        file.write(header)
        for start in range(0, voxels.shape[2], step):
            file.write(encode(voxels[:, :, start : start + step]).astype(dtype).tobytes(order="F"))

    def write_gzip(file: BinaryIO) -> None:
        # Neither time nor name: the same volume must give the same bytes.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as packed:
            write_to(packed)  # type: ignore[arg-type]

    publish(path, write_gzip if name.endswith(".gz") else write_to)


def _header_block(shape: tuple[int, ...], affine: np.ndarray, dtype: np.dtype, slope: float) -> bytes:
    new_header: RawHeader = nibabel.Nifti1Header
    header = new_header(endianness="<")
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, 0, 352
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    # A quaternion holds no shear. Where that moves a voxel, only the sform may speak.
    if math.prod(shape) and difference(affine, header.get_qform(), (shape[0], shape[1], shape[2]))[0] > 0.01:
        header.set_qform(None, code=0)
    return bytes(header.binaryblock) + bytes(4)  # no extensions
