"""NIfTI files made field by field, without the package's own writer, so that any header can be had."""

import gzip
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

LAS = np.array([[-0.8, 0, 0, 90], [0, 0.8, 0, -70], [0, 0, 2.5, -40], [0, 0, 0, 1]])

MakeFile = Callable[..., Path]


def nifti_bytes(array, *, affine=LAS, version=1, endian="<", gap=b"\0\0\0\0", **fields) -> bytes:
    """An [X, Y, Z] array as a single-file NIfTI with sform and qform; `fields` overwrite the header's last."""
    header = (nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header)(endianness=endian)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm")
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    size = 348 if version == 1 else 540
    header["vox_offset"], header["scl_slope"], header["scl_inter"] = size + len(gap), 1, 0
    for field, value in fields.items():
        header[field] = value
    return header.binaryblock + gap + array.astype(array.dtype.newbyteorder(endian)).tobytes(order="F")


@pytest.fixture
def las() -> np.ndarray:
    """The affine of all handmade files, unless they say otherwise."""
    return LAS.copy()


@pytest.fixture
def make_bytes() -> Callable[..., bytes]:
    return nifti_bytes


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    def make(array, name="case.nii.gz", **fields) -> Path:
        content = nifti_bytes(array, **fields)
        path = tmp_path / name
        path.write_bytes(gzip.compress(content, 1, mtime=0) if name.endswith(".gz") else content)
        return path

    return make


@pytest.fixture
def hounsfield() -> np.ndarray:
    """[X, Y, Z] int16, no two axes of one length, no symmetry."""
    return np.random.default_rng(5).integers(-1000, 1500, (7, 6, 5)).astype(np.int16)


@pytest.fixture
def organs() -> np.ndarray:
    """[X, Y, Z] uint8 with background, two organs and ignore."""
    return np.random.default_rng(6).choice([0, 1, 7, 255], (7, 6, 5)).astype(np.uint8)


@pytest.fixture
def as_nobody() -> Callable[[Callable[[], int]], int]:
    """Runs a function in a child process without root's power over permissions; its result (< 256) comes back."""

    def run(function: Callable[[], int]) -> int:
        child = os.fork()
        if child == 0:
            status = 254
            try:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setuid(65534)
                status = function()
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


@pytest.fixture(scope="session")
def scans() -> Path:
    """The real scans of DATA.md."""
    folder = os.environ.get("ORGANSEG_TEST_DATA")
    if not folder:
        pytest.skip("ORGANSEG_TEST_DATA is not set")
    return Path(folder)
