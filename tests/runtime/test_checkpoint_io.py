import errno
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from organseg.checkpoints import load_checkpoint, verify_checkpoint
from organseg.errors import IntegrityError, StorageError
from organseg.runtime.checkpoint_io import newest_good, save_checkpoint


def content(value: float) -> dict[str, object]:
    return {"state_dict": {"weight": torch.full((50, 50), value)}, "global_step": 3, "names": ["a", "b"]}


def value_of(path: Path) -> float:
    return float(load_checkpoint(path)["state_dict"]["weight"][0, 0])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save_checkpoint(content(1.0), path)
    save_checkpoint(content(2.0), path)
    return path


def test_the_one_before_stays_as_previous(saved: Path) -> None:
    assert value_of(saved) == 2.0
    assert value_of(saved.with_name("previous.ckpt")) == 1.0


def test_every_flipped_bit_is_found_and_the_one_before_is_taken(saved: Path) -> None:
    original = saved.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        damaged = bytearray(original)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="damaged"):
            load_checkpoint(saved)
    path, problems = newest_good(saved.parent)
    assert path == saved.with_name("previous.ckpt")
    assert len(problems) == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_is_found(saved: Path, share: float) -> None:
    saved.write_bytes(saved.read_bytes()[: int(share * saved.stat().st_size)])
    with pytest.raises(IntegrityError):
        verify_checkpoint(saved)


def test_copied_without_its_list_it_is_checked_by_its_own_sums(saved: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(saved.read_bytes())
    assert value_of(alone) == 2.0
    damaged = bytearray(saved.read_bytes())
    damaged[damaged.index(torch.full((8,), 2.0).numpy().tobytes()) + 5] ^= 1
    alone.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="checksum"):
        load_checkpoint(alone)


def test_kill_between_list_and_file_leaves_a_good_file(saved: Path) -> None:
    listed = saved.with_name("last.ckpt.sha256")
    listed.write_text("f" * 64 + "\n" + listed.read_text())
    assert value_of(saved) == 2.0


def test_what_would_not_load_again_is_never_saved(saved: Path) -> None:
    with pytest.raises(IntegrityError, match="would not load again"):
        save_checkpoint({"path": Path("somewhere"), "function": print}, saved)
    assert value_of(saved) == 2.0


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "PWNED",))

    evil = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "x": Payload()}, evil)
    with pytest.raises(IntegrityError, match="plain values"):
        load_checkpoint(evil)
    assert not (tmp_path / "PWNED").exists()


def test_full_disk_leaves_the_old_one(saved: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageError, match=r"last\.ckpt"):
            save_checkpoint(content(3.0), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert value_of(saved) == 2.0
    assert [path.name for path in saved.parent.glob(".*")] == []


def test_kill_9_while_saving_leaves_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    script = (
        "import sys, torch; from pathlib import Path; from organseg.runtime.checkpoint_io import save_checkpoint\n"
        "for i in range(10**6):\n"
        "    save_checkpoint({'state_dict': {'weight': torch.full((200, 200), float(i))}}, Path(sys.argv[1]))\n"
        "    print(i, flush=True)\n"
    )
    draw = random.Random(1)
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(draw.randrange(20, 40)):
        process.stdout.readline()
    process.kill()
    process.wait()
    done = [int(line) for line in process.stdout.read().split()]
    good, problems = newest_good(tmp_path)
    assert problems == []
    assert good == path
    assert value_of(path) >= (done[-1] if done else 19)


def test_a_file_system_without_second_names_gets_a_copy(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refused)
    first = saved.read_bytes()
    save_checkpoint({"state_dict": {"w": torch.ones(3)}}, saved)
    assert saved.with_name("previous.ckpt").read_bytes() == first
    assert verify_checkpoint(saved) != verify_checkpoint(saved.with_name("previous.ckpt"))
