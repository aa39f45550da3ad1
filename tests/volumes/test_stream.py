import gzip
import os
import signal
import tracemalloc
import zlib

import numpy as np
import pytest

from organseg.errors import InputError
from organseg.volumes import read_image, to_canonical


@pytest.fixture(autouse=True)
def never_hangs(request):
    """A FIFO, an endless device or a bomb must end a test, not stop the suite."""

    def stop(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(600 if request.node.get_closest_marker("faults") else 60)  # a busy machine is slow, too
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(path, **options):
    with pytest.raises(InputError) as caught:
        read_image(path, case="c1", **options)
    fault = next(fault for fault in caught.value.faults if fault.refused)
    assert fault.case == "c1"
    assert all((fault.path, fault.field, fault.found, fault.expected, fault.remedy))
    return fault


def test_plain_and_gzip_give_the_same(make_file, hounsfield, las):
    expected = to_canonical(hounsfield, las)
    for name in ("a.nii", "a.nii.gz", "b.NII"):
        volume, warnings = read_image(make_file(hounsfield, name), case="c1")
        assert (volume.array == expected).all()
        assert warnings == []


def test_gzip_of_several_members_is_accepted(tmp_path, hounsfield, las, make_bytes):
    content = make_bytes(hounsfield)
    path = tmp_path / "bgzip.nii.gz"
    path.write_bytes(
        b"".join(gzip.compress(content[at : at + 100]) for at in range(0, len(content), 100)) + gzip.compress(b"")
    )
    assert (read_image(path, case="c1")[0].array == to_canonical(hounsfield, las)).all()


@pytest.mark.parametrize(
    "junk", [b"\0", b"junk", b"\x1f", b"\x1f\x8b", bytes(300_000), gzip.compress(b"more", mtime=0)]
)
def test_anything_after_the_stream_is_refused(make_file, hounsfield, junk):
    path = make_file(hounsfield)
    path.write_bytes(path.read_bytes() + junk)
    fault = refusal(path)
    assert fault.field in ("gzip", "length")
    assert "junk" in fault.found or junk.startswith(b"\x1f\x8b") or junk == b"\x1f"


def test_every_truncation_of_a_gzip_is_refused(make_file, hounsfield):
    path = make_file(hounsfield)
    whole = path.read_bytes()
    for size in [*range(1, len(whole), 7), *range(len(whole) - 12, len(whole))]:
        path.write_bytes(whole[:size])
        refusal(path)


def test_every_truncation_of_a_plain_file_is_refused(make_file, hounsfield):
    path = make_file(hounsfield, "a.nii")
    whole = path.read_bytes()
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        refusal(path)
    path.write_bytes(whole + b"\0")
    assert refusal(path).field == "length"


def flip(content: bytes, bit: int) -> bytes:
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def check_flips(path, bits) -> None:
    """A flip is refused, or it leaves the content as it was: gzip's time stamp, or one zero run copied from another."""
    whole = path.read_bytes()
    content, expected = gzip.decompress(whole), read_image(path, case="c1")[0].array
    found = 0
    for bit in bits:
        path.write_bytes(flip(whole, bit))
        try:
            array = read_image(path, case="c1")[0].array
        except InputError:
            found += 1
        else:
            assert (array == expected).all()
            assert gzip.decompress(path.read_bytes()) == content
    assert found > 0.98 * len([bit for bit in bits if bit >= 80])


def test_bit_flips_in_a_gzip_never_change_a_volume(make_file, hounsfield):
    path = make_file(hounsfield)
    count = path.stat().st_size * 8
    check_flips(path, [*range(80), *np.random.default_rng(3).choice(count, 300).tolist(), *range(count - 64, count)])


@pytest.mark.faults
def test_no_bit_flip_in_a_gzip_changes_a_volume(make_file, hounsfield):
    path = make_file(hounsfield)
    check_flips(path, range(path.stat().st_size * 8))


@pytest.mark.parametrize("at", [-8, -4], ids=["CRC", "length"])
def test_wrong_checksum_is_refused(make_file, hounsfield, at):
    path = make_file(hounsfield)
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    assert refusal(path).field == "gzip"


def test_missing_checksum_is_refused(make_file, hounsfield):
    path = make_file(hounsfield)
    path.write_bytes(path.read_bytes()[:-8])
    assert refusal(path).field == "gzip"


def test_content_of_a_wrong_name_is_refused(make_file, hounsfield):
    make_file(hounsfield, "a.nii").rename(false_gz := make_file(hounsfield))
    assert refusal(false_gz).field == "file name"
    make_file(hounsfield, "b.nii.gz").rename(hidden_gz := make_file(hounsfield, "c.nii"))
    assert refusal(hidden_gz).field == "file name"


@pytest.mark.parametrize("name", ["a.hdr", "a.img", "a.img.gz"])
def test_pairs_are_refused_with_a_remedy(make_file, hounsfield, name):
    fault = refusal(make_file(hounsfield, name))
    assert "pair" in fault.found
    assert "convert" in fault.remedy


def test_other_endings_are_refused(make_file, hounsfield):
    assert refusal(make_file(hounsfield, "a.nrrd")).field == "file name"


def test_places_without_a_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.nii.gz")
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "empty.nii").touch()
    (tmp_path / "device.nii").symlink_to("/dev/zero")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    expected = {
        "fifo.nii.gz": "a FIFO",
        "folder.nii": "a folder",
        "empty.nii": "0 bytes",
        "device.nii": "a special file",
        "loop.nii": "unreadable",
        "missing.nii": "nothing",
        "nul\0.nii": "unreadable",
        f"{'long' * 99}.nii": "unreadable",
    }
    for name, found in expected.items():
        fault = refusal(tmp_path / name)
        assert fault.field == "file"
        assert found in fault.found


def test_a_forbidden_file_is_refused(open_folder, as_nobody, hounsfield, make_bytes):
    path = open_folder / "secret.nii"
    path.write_bytes(make_bytes(hounsfield))

    def outcome() -> int:
        try:
            read_image(path, case="c1")
        except InputError as error:
            return 3 if "unreadable" in error.faults[0].found else 1
        return 0

    path.chmod(0o644)
    assert as_nobody(outcome) == 0
    path.chmod(0)
    assert as_nobody(outcome) == 3


def test_faults_name_the_path_below_the_root(tmp_path):
    assert refusal(tmp_path / "set" / "a.nii", root=tmp_path).path == "set/a.nii"
    assert refusal(tmp_path / "a.nii").path == str(tmp_path / "a.nii")
    assert refusal(tmp_path / "a.nii", root=tmp_path / "other").path == str(tmp_path / "a.nii")


def test_a_bomb_is_not_inflated(tmp_path, hounsfield, make_bytes):
    path = tmp_path / "bomb.nii.gz"
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    content = [pack.compress(make_bytes(hounsfield))] + [pack.compress(bytes(1 << 20)) for _ in range(100)]
    path.write_bytes(b"".join(content) + pack.flush())
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    try:
        assert refusal(path).field == "length"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["huge.nii", "huge.nii.gz"])
def test_a_header_that_declares_more_than_the_file_holds_takes_no_memory(make_file, hounsfield, name):
    path = make_file(hounsfield, name, dim=[3, 4096, 4096, 128, 1, 1, 1, 1])
    tracemalloc.start()
    try:
        fault = refusal(path)
        assert fault.field == "length"
        assert "4096 x 4096 x 128" in fault.found
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
