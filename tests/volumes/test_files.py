"""FAULTS.md section 1, promise 1, and the rows on files of section 2, with real processes."""

import errno
import hashlib
import os
import resource
import signal
import stat
import time

import numpy as np
import pytest

from organseg.errors import StorageError
from organseg.files import publish, reap_stale, sha256_of

OLD, NEW = b"old" * 30_000, b"new!" * 50_000


def in_pieces(content):
    def write(file) -> None:
        for at in range(0, len(content), 4096):
            file.write(content[at : at + 4096])

    return write


def fork(function) -> int:
    """A child process that runs `function` and ends with its result."""
    child = os.fork()
    if child == 0:
        status = 254
        try:
            status = function() or 0
        finally:
            os._exit(status)
    return child


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "a.bin"
    for content in (OLD, NEW, b""):
        publish(path, in_pieces(content))
        assert path.read_bytes() == content
        assert names(tmp_path) == {"a.bin"}


def test_only_the_owner_may_read(tmp_path):
    before = os.umask(0)
    try:
        publish(tmp_path / "a.bin", in_pieces(NEW))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o600


def test_what_was_written_can_be_read_back_before_it_is_published(tmp_path):
    def write(file) -> None:
        file.write(NEW)
        file.seek(0)
        assert file.read() == NEW

    publish(tmp_path / "a.bin", write)


def test_bytes_reach_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(stat.S_ISDIR(os.fstat(fd).st_mode)) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    publish(tmp_path / "a.bin", in_pieces(NEW))
    assert calls == [False, "replace", True]


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(OLD)

    def write(file) -> None:
        file.write(NEW)
        raise error

    with pytest.raises(type(error)):
        publish(path, write)
    assert path.read_bytes() == OLD
    assert names(tmp_path) == {"a.bin"}


def test_a_full_disk_is_a_storage_error(tmp_path):
    def write(file) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"a\.bin: cannot be written: No space left on device"):
        publish(tmp_path / "a.bin", write)
    assert names(tmp_path) == set()


def test_a_limit_at_any_byte_leaves_old_or_new(tmp_path):
    # RLIMIT_FSIZE is the disk that fills up within a write: really short writes, then EFBIG.
    path = tmp_path / "a.bin"
    for limit in [0, 1, 4095, 4096, 4097, *range(10_000, len(NEW), 31_000), len(NEW) - 1, len(NEW)]:
        path.write_bytes(OLD)

        def attempt(limit=limit) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                publish(path, in_pieces(NEW))
            except StorageError as error:
                return 5 if str(path) in str(error) else 1
            return 0

        status = os.waitstatus_to_exitcode(os.waitpid(fork(attempt), 0)[1])
        assert status == (0 if limit >= len(NEW) else 5)
        assert path.read_bytes() == (NEW if status == 0 else OLD)
        assert names(tmp_path) == {"a.bin"}


def test_a_forbidden_folder_is_a_storage_error(open_folder, as_nobody):
    path = open_folder / "a.bin"
    path.write_bytes(OLD)

    def attempt() -> int:
        try:
            publish(path, in_pieces(NEW))
        except StorageError as error:
            return 5 if "Permission denied" in str(error) else 1
        return 0

    open_folder.chmod(0o555)
    assert as_nobody(attempt) == 5
    assert path.read_bytes() == OLD
    open_folder.chmod(0o777)
    assert as_nobody(attempt) == 0
    assert path.read_bytes() == NEW


def test_missing_and_odd_places_are_storage_errors(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("missing/a.bin", "file/a.bin", "folder", "x" * 256):
        with pytest.raises(StorageError):
            publish(tmp_path / name, in_pieces(NEW))
    assert names(tmp_path) == {"file", "folder"}


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    for name in ("x" * 255, "ü" * 127):
        publish(tmp_path / name, in_pieces(NEW))
        assert (tmp_path / name).read_bytes() == NEW


def test_kill_during_the_write_leaves_the_old_file_and_a_stale_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(OLD)
    ready, tell = os.pipe()

    def killed() -> None:
        def write(file) -> None:
            file.write(NEW)
            file.flush()
            os.write(tell, b".")
            time.sleep(60)

        publish(path, write)

    child = fork(killed)
    os.read(ready, 1)
    assert len(names(tmp_path)) == 2
    assert reap_stale(tmp_path) == []  # its owner lives
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes() == OLD
    (stale,) = reap_stale(tmp_path)
    assert stale.name.startswith(".a.bin.")
    assert names(tmp_path) == {"a.bin"}


def test_kill_at_any_moment_leaves_old_or_new(tmp_path):
    path = tmp_path / "a.bin"
    moments = np.random.default_rng(11).uniform(0.001, 0.015, 40)
    contents = [bytes([65 + turn]) * 200_000 for turn in range(8)]
    path.write_bytes(contents[0])

    def publish_on() -> None:
        while True:
            for content in contents:
                publish(path, in_pieces(content))

    for moment in moments:
        child = fork(publish_on)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert path.read_bytes() in contents
    reap_stale(tmp_path)
    assert names(tmp_path) == {"a.bin"}


def test_only_dead_owners_on_this_host_lose_their_files(tmp_path):
    made = []
    os.waitpid(fork(lambda: publish(tmp_path / "a.bin", lambda file: os._exit(0))), 0)
    (stale,) = tmp_path.iterdir()
    publish(tmp_path / "b.bin", lambda file: made.extend(tmp_path.glob(".b.bin.*")))
    (mine,) = made
    mine.touch()
    # Another process that got my pid, e.g. the same container before its restart.
    host, pid, start, token, _ = mine.name.removeprefix(".b.bin.").split(".")
    earlier = tmp_path / f".b.bin.{host}.{pid}.{int(start) - 1}.{token}.tmp"
    foreign = tmp_path / stale.name.replace(host, "elsewhere")
    other = tmp_path / ".other.tmp"
    for path in (earlier, foreign, other):
        path.touch()
    assert sorted(reap_stale(tmp_path)) == sorted([stale, earlier])
    assert names(tmp_path) == {mine.name, foreign.name, other.name, "b.bin"}


def test_reaping_a_missing_folder_removes_nothing(tmp_path):
    assert reap_stale(tmp_path / "missing") == []


def test_threads_may_publish_one_name(tmp_path):
    import threading

    contents = [bytes([65 + turn]) * 100_000 for turn in range(4)]
    threads = [
        threading.Thread(target=lambda c=content: [publish(tmp_path / "a.bin", in_pieces(c)) for _ in range(5)])
        for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.bin").read_bytes() in contents
    assert names(tmp_path) == {"a.bin"}


def test_sha256(tmp_path):
    (tmp_path / "a.bin").write_bytes(NEW)
    assert sha256_of(tmp_path / "a.bin") == hashlib.sha256(NEW).hexdigest()
