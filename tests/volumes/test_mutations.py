"""Seeded mutations of headers: never a traceback, a hang, much memory or, in silence, another volume (FAULTS.md 3).

What a header means is worked out here a second time, straight from its bytes.
"""

import gzip
import struct
import time
import tracemalloc

import nibabel
import numpy as np
import pytest

from organseg.errors import InputError
from organseg.volumes import read_image, read_label

KINDS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}


def mutate(content: bytes, generator: np.random.Generator, size: int) -> bytes:
    mutated = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        at = int(generator.integers(0, size + 4))
        match generator.integers(0, 4):
            case 0:
                mutated[at] ^= 1 << int(generator.integers(0, 8))
            case 1:
                mutated[at] = int(generator.integers(0, 256))
            case 2:
                mutated[at] = int(generator.choice([0, 1, 127, 128, 255]))
            case _:  # a whole number field: NaN, infinity, extremes
                value = generator.choice([np.nan, np.inf, -np.inf, 0, -1, 1e38, 1e-40, 2**31])
                mutated[at // 4 * 4 : at // 4 * 4 + 4] = struct.pack("<f", value)
    return bytes(mutated)


def meaning(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Values [X, Y, Z] float64 and affine, as a NIfTI-1's bytes have them; for accepted files only."""
    order = "<" if content[0] == 92 else ">"
    dim = struct.unpack_from(order + "8h", content, 40)
    (kind,) = struct.unpack_from(order + "h", content, 70)
    pixdim = struct.unpack_from(order + "8f", content, 76)
    offset, slope, inter = struct.unpack_from(order + "3f", content, 108)
    qform_code, sform_code = struct.unpack_from(order + "2h", content, 252)
    b, c, d, *origin = struct.unpack_from(order + "6f", content, 256)
    values = np.frombuffer(content[int(offset) :], order + KINDS[kind]).reshape(dim[1:4], order="F").astype(float)
    if slope != 0 and not np.isnan(slope):
        values = values * slope + inter
    if sform_code > 0:
        return values, np.array([*struct.unpack_from(order + "12f", content, 280), 0, 0, 0, 1]).reshape(4, 4)
    assert qform_code > 0
    affine = np.eye(4)
    a = np.sqrt(max(0, 1 - b * b - c * c - d * d))
    zooms = np.array(pixdim[1:4]) * [1, 1, -1 if pixdim[0] < 0 else 1]
    affine[:3, :3] = nibabel.quaternions.quat2mat([a, b, c, d]) * zooms
    affine[:3, 3] = origin
    return values, affine


def assert_same_volume(volume, values, affine) -> None:
    assert volume.array.size == values.size
    indices = np.indices(volume.shape).reshape(3, -1)
    z, y, x = volume.index_to_mm[:3, :3] @ indices + volume.index_to_mm[:3, 3:]
    voxels = np.linalg.solve(affine[:3, :3], np.stack([-x, -y, z]) - affine[:3, 3:])
    expected = values[tuple(np.clip(np.rint(voxels).astype(int), 0, np.array(values.shape)[:, None] - 1))]
    bad = ~np.isfinite(expected) | (np.abs(expected) > 3e38)
    assert np.array_equal(volume.array.reshape(-1)[~bad], expected[~bad].astype(volume.array.dtype))


def campaign(tmp_path, content, count, seed, read, size=348) -> int:
    """How many mutated files were accepted."""
    accepted = 0
    for turn in range(count):
        print("mutation", seed, turn)  # what to repeat where it fails
        mutated = mutate(content, np.random.default_rng([seed, turn]), size)
        packed = turn % 2
        path = tmp_path / ("m.nii.gz" if packed else "m.nii")
        path.write_bytes(gzip.compress(mutated, 1) if packed else mutated)
        try:
            volume, _ = read(path, case="c1")
        except InputError as error:
            assert error.faults
            continue
        accepted += 1
        if size == 348:
            values, affine = meaning(mutated)
            assert_same_volume(volume, np.rint(values) if read is read_label else values, affine)
    return accepted


@pytest.fixture
def content(make_bytes, hounsfield, organs):
    return {read_image: make_bytes(hounsfield), read_label: make_bytes(np.minimum(organs, 9).astype(np.int16))}


@pytest.mark.parametrize("read", [read_image, read_label])
def test_mutated_headers(tmp_path, content, read):
    tracemalloc.start()
    start = time.process_time()
    try:
        accepted = campaign(tmp_path, content[read], 150, 20, read)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 10
    # Both ways out are taken: many fields (descrip, cal_max, ...) mean nothing for the volume.
    assert 15 < accepted < 135


@pytest.mark.faults
@pytest.mark.parametrize("read", [read_image, read_label])
def test_two_thousand_mutated_headers(tmp_path, content, make_bytes, hounsfield, organs, read):
    campaign(tmp_path, content[read], 1000, 21, read)
    array = hounsfield if read is read_image else organs
    campaign(tmp_path, make_bytes(array, endian=">"), 500, 22, read)
    campaign(tmp_path, make_bytes(array, sform_code=0), 250, 23, read)
    campaign(tmp_path, make_bytes(array, version=2), 250, 24, read, size=540)
