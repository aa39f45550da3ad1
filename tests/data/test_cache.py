"""FAULTS.md section 2."""

import hashlib
import json
import os
import pickle
import resource
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest

from organseg.data.cache import (
    CachedCase,
    CaseArrays,
    CaseHeader,
    NewerSchemaError,
    SliceReader,
    case_files,
    organ_boxes,
    organ_counts,
    write_case,
)
from organseg.errors import IntegrityError, StorageError

SHAPE = (5, 150, 140)  # more than one chunk in a plane
HEADER = CaseHeader(
    key="tiny/case0",
    patient="p1",
    modality="CT",
    organs=("liver", "spleen", "pancreas"),
    annotated=("liver", "pancreas"),
    spacing=(2.5, 0.7, 0.8),
    affine=((1.0, 0.0, 0.0, -3.25), (0.0, 1.0, 0.0, 0.1), (0.0, 0.0, 2.5, 7.0), (0.0, 0.0, 0.0, 1.0)),
    source_shape=(5, 300, 280),
    source_spacing=(2.5, 0.35, 0.4),
    image_sha256="a" * 64,
    label_sha256="b" * 64,
    preprocessing={"size": 150, "spacing": (1.0, 2.0, 3.0)},
)


def make_arrays(seed: int = 0) -> CaseArrays:
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    label[1:4, 20:60, 30:50] = 1
    label[3:, 100:, :9] = 3
    label[0, 0] = 255
    return CaseArrays(rng.integers(-1000, 1000, SHAPE).astype(np.int16), label, np.repeat(label, 2, axis=1))


def write(folder: Path, name: str = "case0", seed: int = 0) -> Path:
    path = folder / "tiny" / f"{name}.h5"
    path.parent.mkdir(exist_ok=True, parents=True)
    write_case(path, HEADER, make_arrays(seed))
    return path


def refused(path: Path) -> str:
    with pytest.raises(IntegrityError) as caught:
        _ = CachedCase(path).header
    assert f"tiny/{path.stem}" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read(tmp_path):
    case, arrays = CachedCase(write(tmp_path)), make_arrays()
    assert case.header == HEADER  # tuples again, at any depth
    assert hash(case.header.preprocessing["spacing"])
    found = case.arrays()
    for name in ("image", "label", "source_label"):
        assert getattr(found, name).dtype == getattr(arrays, name).dtype
        assert (getattr(found, name) == getattr(arrays, name)).all()
    assert (case.source_label() == arrays.source_label).all()
    assert case.shape == SHAPE
    # By hand: organ 1 has 40 x 20 voxels in slices 1 to 3, organ 3 has 50 x 9 in 3 and 4, organ 2 none, 255 is none.
    assert case.organ_counts.tolist() == [[0, 0, 0], [800, 0, 0], [800, 0, 0], [800, 0, 450], [0, 0, 450]]
    assert case.organ_boxes.tolist() == [
        [[1, 4], [20, 60], [30, 50]],
        [[0, 0], [0, 0], [0, 0]],
        [[3, 5], [100, 150], [0, 9]],
    ]


def test_without_resampling_the_label_is_the_source_label(tmp_path):
    path, arrays = tmp_path / "case0.h5", make_arrays()
    write_case(path, HEADER, CaseArrays(arrays.image.astype(np.float32), arrays.label, None))
    case = CachedCase(path)
    assert case.arrays().source_label is None
    assert (case.source_label() == arrays.label).all()
    assert case.arrays().image.dtype == np.float32


def test_tables_of_an_empty_label():
    empty = np.zeros((2, 3, 4), np.uint8)
    assert not organ_boxes(empty, 2).any() and organ_boxes(empty, 2).shape == (2, 3, 2)
    assert organ_counts(empty, 2).tolist() == [[0, 0], [0, 0]]


def test_equal_input_gives_equal_bytes_and_one_digest(tmp_path):
    first, second, other = write(tmp_path / "a"), write(tmp_path / "b"), write(tmp_path / "c", seed=1)
    assert first.read_bytes() == second.read_bytes()
    assert CachedCase(first).digest == CachedCase(second).digest != CachedCase(other).digest
    assert first.stat().st_mode & 0o777 == 0o600


def test_every_flipped_bit_is_found(tmp_path):
    path = write(tmp_path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, len(content), 170), *range(0, 600, 30), *range(len(content) - 10, len(content))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        refused(path)
    path.write_bytes(content)
    assert CachedCase(path).header == HEADER


@pytest.mark.parametrize("look", ["digest", "header", "organ_counts", "organ_boxes", "shape", "arrays", "source_label"])
def test_nothing_is_read_from_a_damaged_file(tmp_path, look):
    path = write(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="content hash"):
        value = getattr(CachedCase(path), look)
        _ = value() if callable(value) else value
    with pytest.raises(IntegrityError, match="content hash"):
        SliceReader([CachedCase(path)]).read(0, 0)


def test_every_truncation_is_found(tmp_path):
    path = write(tmp_path)
    content = path.read_bytes()
    for part in range(32):
        path.write_bytes(content[: len(content) * part // 32])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path)


def test_garbage_missing_and_foreign_files_are_refused(tmp_path):
    path = write(tmp_path)
    rng = np.random.default_rng(1)
    for size in (0, 1, 15, 16, 511, 512, 513, 100_000):
        path.write_bytes(rng.bytes(size))
        refused(path)
    path.write_bytes(b"organseg case\n" + rng.bytes(5000))
    refused(path)
    path.unlink()
    assert "No such file" in refused(path)
    path.mkdir()
    assert "directory" in refused(path)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    path = write(tmp_path)
    before, limit = path.read_bytes(), path.stat().st_size - 100
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            write(tmp_path, seed=1)
        except StorageError:
            status = 5
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def forge(path: Path, build, header: object = HEADER.__dict__) -> None:
    """A file with the right digest, made by somebody else."""
    buffer = BytesIO()
    with h5py.File(buffer, "w", userblock_size=512) as file:
        arrays = make_arrays()
        file["image"], file["label"] = arrays.image, arrays.label
        file["organ_counts"], file["organ_boxes"] = organ_counts(arrays.label, 3), organ_boxes(arrays.label, 3)
        if header is not None:
            file.attrs["header"] = json.dumps(header)
        build(file)
    body = buffer.getvalue()[512:]
    publish_forged(path, body)


def publish_forged(path: Path, body: bytes) -> None:
    digest = hashlib.blake2b(body, digest_size=32).hexdigest().encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((b"organseg case\n" + digest + b"\n").ljust(512, b"\0") + body)


def test_a_forged_file_without_tricks_is_read(tmp_path):
    # Else the next tests would refuse for another reason than they say.
    path = tmp_path / "tiny" / "case0.h5"
    forge(path, lambda file: None)
    assert CachedCase(path).header == HEADER
    assert (CachedCase(path).arrays().image == make_arrays().image).all()


SECRET = np.full(SHAPE, 77, np.int16)


def _replace(name, make):
    def build(file):
        del file[name]
        make(file)

    return build


def _external_storage(file):
    file.create_dataset("image", SHAPE, "i2", external=[("secret.raw", 0, SECRET.nbytes)])


def _virtual(file):
    layout = h5py.VirtualLayout(SHAPE, "i2")
    layout[:] = h5py.VirtualSource("secret.h5", "image", SHAPE)
    file.create_virtual_dataset("image", layout)


TRICKS = {
    "external link": _replace(
        "image", lambda file: file.__setitem__("image", h5py.ExternalLink("secret.h5", "/image"))
    ),
    "soft link": _replace("image", lambda file: file.__setitem__("image", h5py.SoftLink("/label"))),
    "external storage": _replace("image", _external_storage),
    "virtual dataset": _replace("image", _virtual),
    "unknown dataset": lambda file: file.__setitem__("extra", np.zeros(3)),
    "unknown external link": lambda file: file.__setitem__("extra", h5py.ExternalLink("secret.h5", "/")),
    "group": _replace("image", lambda file: file.create_group("image")),
    "object references": _replace("image", lambda file: file.create_dataset("image", (2,), h5py.ref_dtype)),
    "text": _replace("image", lambda file: file.create_dataset("image", (2,), h5py.string_dtype())),
    "no image": lambda file: file.__delitem__("image"),
    "no boxes": lambda file: file.__delitem__("organ_boxes"),
    "another filter": _replace("image", lambda file: file.create_dataset("image", data=SECRET, compression="gzip")),
    "a tebibyte in no bytes": _replace("image", lambda file: file.create_dataset("image", (4096, 16384, 16384), "u1")),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_right_digest_does_not_excuse_what_no_case_holds(tmp_path, monkeypatch, trick):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny" / "case0.h5"
    path.parent.mkdir()
    SECRET.tofile(tmp_path / "secret.raw")
    SECRET.tofile(path.parent / "secret.raw")
    for folder in (tmp_path, path.parent):
        with h5py.File(folder / "secret.h5", "w") as file:
            file["image"] = SECRET
    forge(path, TRICKS[trick])
    assert "strange" in refused(path)
    for look in (CachedCase(path).arrays, lambda: SliceReader([CachedCase(path)]).read(0, 0)):
        with pytest.raises(IntegrityError, match="strange"):
            look()


@pytest.mark.parametrize(
    "header", [None, "text", [1], {}, {"schema": 1}, {**HEADER.__dict__, "more": 1}, {**HEADER.__dict__, "schema": "1"}]
)
def test_a_header_that_is_none_is_refused(tmp_path, header):
    path = tmp_path / "tiny" / "case0.h5"
    forge(path, lambda file: None, header)
    assert "header" in refused(path)


def test_no_hdf5_behind_a_right_digest(tmp_path):
    path = tmp_path / "tiny" / "case0.h5"
    rng = np.random.default_rng(2)
    body = write(tmp_path / "real").read_bytes()[512:]
    for start in range(0, 2000, 100):  # superblock, groups, attributes: libhdf5 must not see them unprotected
        damaged = bytearray(body)
        damaged[start : start + 100] = rng.bytes(100)
        publish_forged(path, bytes(damaged))
        try:
            _ = CachedCase(path).header
        except IntegrityError:
            continue
    publish_forged(path, b"")
    refused(path)


def test_schemas(tmp_path):
    path = tmp_path / "tiny" / "case0.h5"
    forge(path, lambda file: None, {**HEADER.__dict__, "schema": 2, "unheard_of": 1})
    with pytest.raises(NewerSchemaError, match="newer organseg"):
        _ = CachedCase(path).header
    forge(path, lambda file: None, {**HEADER.__dict__, "schema": 0})
    assert "schema 0" in refused(path)


def open_cases(folder: Path) -> list[str]:
    """Names of the files below a folder that this process has open, sorted."""
    paths = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            paths.append(descriptor.readlink())
        except OSError:  # the one that listed them
            continue
    return sorted(path.name for path in paths if path.is_relative_to(folder))


def test_slices(tmp_path):
    paths = [write(tmp_path, f"case{i}", i) for i in range(3)]
    reader = SliceReader([CachedCase(path) for path in paths], max_open=1)
    for case, z in [(0, 0), (1, 4), (0, 2), (2, 1), (2, 3), (1, 1)]:
        image, label = reader.read(case, z)
        arrays = make_arrays(case)
        assert (image == arrays.image[z]).all() and image.dtype == np.int16
        assert (label == arrays.label[z]).all()
        assert open_cases(tmp_path) == [f"case{case}.h5"]


def test_the_least_recently_used_file_is_closed(tmp_path):
    reader = SliceReader([CachedCase(write(tmp_path, f"case{i}", i)) for i in range(3)], max_open=2)
    for case in (0, 1, 0, 2):
        reader.read(case, 0)
    assert open_cases(tmp_path) == ["case0.h5", "case2.h5"]


def test_a_forked_or_pickled_reader_opens_its_own_files(tmp_path):
    paths = [write(tmp_path, f"case{i}", i) for i in range(2)]
    reader = SliceReader([CachedCase(path) for path in paths])
    reader.read(0, 0)
    inherited = os.fstat(next(iter(reader._files.values()))[0].id.get_vfd_handle())
    again = tmp_path / "again.h5"
    again.write_bytes(paths[0].read_bytes())
    again.replace(paths[0])  # the same bytes in another file: who reads the old one uses the parent's handle
    child = os.fork()
    if child == 0:
        status = 1
        try:
            good = all((reader.read(c, z)[0] == make_arrays(c).image[z]).all() for c in (0, 1) for z in range(5))
            own = os.fstat(reader._files[0][0].id.get_vfd_handle())
            status = 0 if good and own.st_ino != inherited.st_ino else 2
        finally:
            os._exit(status)
    for z in range(5):
        assert (reader.read(0, z)[0] == make_arrays(0).image[z]).all()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    travelled = pickle.loads(pickle.dumps(reader))
    assert (travelled.read(1, 3)[0] == make_arrays(1).image[3]).all()
    assert travelled.paths == paths


def test_a_case_can_travel_to_another_process(tmp_path):
    case = CachedCase(write(tmp_path))
    _ = case.header, case.organ_counts
    travelled = pickle.loads(pickle.dumps(case))
    assert travelled.header == HEADER
    assert (travelled.arrays().label == make_arrays().label).all()


def test_files_of_a_folder_are_sorted(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path, name)
    (tmp_path / "tiny" / "index.json").write_text("{}")
    assert [path.stem for path in case_files(tmp_path / "tiny")] == ["a", "b", "c"]


def test_a_case_that_was_replaced_meanwhile_is_refused_by_who_knew_the_old_one(tmp_path):
    path = write(tmp_path)
    case, reader = CachedCase(path), SliceReader([CachedCase(path)])
    assert case.header == HEADER  # and organs of the header are what its labels mean
    write(tmp_path, seed=5)
    for look in (case.arrays, case.source_label, lambda: case.organ_counts, lambda: reader.read(0, 0)):
        with pytest.raises(IntegrityError, match="another case than when it was first read"):
            look()
    assert (CachedCase(path).arrays().image == make_arrays(5).image).all()
    write(tmp_path)  # and the same content once more is the same case
    assert (case.arrays().image == make_arrays().image).all()
