"""A cache on a local disk: copied once whoever asks, and the same data whatever happened to the copy (FAULTS.md 2)."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic import make_cache, write_dataset

from organseg.data.cohort import Cohort, CohortOptions, load_cohort
from organseg.data.staging import load_staged, place_of, stage
from organseg.errors import IntegrityError, StorageError, UsageError
from organseg.volumes import WorkingGrid

CASES = 5
SMALL = WorkingGrid(size=16)
KILLED_AT = Path(__file__).parents[1] / "killed_at"
PROCESS = """
import sys, time
from pathlib import Path
from organseg.data.cohort import CohortOptions
from organseg.data.staging import load_staged
cache, folder, go = map(Path, sys.argv[1:])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
print(load_staged(CohortOptions(cache, None, None, 0, 3, 0, 0.2, 1.0, 0), folder).content_hash)
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_dataset(folder / "tiny", CASES)
    write_dataset(folder / "other", 1, name="other", seed=20)
    return folder


@pytest.fixture
def cache(sets: Path, tmp_path: Path) -> Path:
    """A shared cache of two data sets."""
    for name in ("tiny", "other"):
        make_cache(sets / name / "dataset.yaml", tmp_path / "cache", SMALL)
    return tmp_path / "cache"


def options(cache: Path, *datasets: str) -> CohortOptions:
    return CohortOptions(cache, list(datasets) or None, None, 0, 3, 0, 0.2, 1.0, 0)


def staged(cache: Path, folder: Path) -> Cohort:
    """The cohort of `tiny`."""
    return load_staged(options(cache, "tiny"), folder)


def files(folder: Path) -> dict[str, bytes]:
    """What a cohort is read from."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix == ".h5" or path.name == "index.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def begin(cache: Path, folder: Path, go: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that stages once `go` exists."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, cache, folder, go],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KILLED_AT), **environment},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def writes(folder: Path) -> list[str]:
    """Names that files took in the folder, as `killed_at/sitecustomize.py` saw them."""
    log = folder.with_name(f"{folder.name}.writes").read_text().splitlines()
    return [Path(line.split()[1]).name for line in log if line.startswith("os.rename") and "killed" not in line]


def test_the_copy_is_the_same_data(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort, folder = staged(cache, tmp_path / "disk"), tmp_path / "disk"
    assert cohort.content_hash == load_cohort(options(cache, "tiny")).content_hash
    place = place_of(cache, folder)
    assert all(case.cached.path.is_relative_to(place) for case in cohort.train + cohort.val + cohort.test)
    assert files(place) == {name: content for name, content in files(cache).items() if name.startswith("tiny")}
    assert {path.stat().st_mode & 0o777 for path in place.rglob("*")} == {0o600, 0o700}
    assert place.stat().st_mode & 0o777 == 0o700
    assert re.fullmatch(rf"staged 5 of 5 cases, [0-9.]+ kB, to {place}\n", capsys.readouterr().out)


def test_all_data_sets_and_those_that_are_tested_on(cache: Path, tmp_path: Path) -> None:
    everything = load_staged(options(cache), tmp_path / "disk")
    assert everything.content_hash == load_cohort(options(cache)).content_hash
    held = CohortOptions(cache, None, None, 0, 3, 0, 0.2, 1.0, 0, ["other"])
    assert load_staged(held, tmp_path / "disk").content_hash == load_cohort(held).content_hash
    shutil.rmtree(cache / "other")  # its copy is none of this cache any more
    assert load_staged(options(cache), tmp_path / "disk").content_hash == load_cohort(options(cache)).content_hash


def test_a_second_time_copies_nothing(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    staged(cache, tmp_path / "disk")
    before = {path: path.stat().st_ino for path in (tmp_path / "disk").rglob("*")}
    capsys.readouterr()
    staged(cache, tmp_path / "disk")
    assert {path: path.stat().st_ino for path in (tmp_path / "disk").rglob("*")} == before
    assert capsys.readouterr().out == ""


def test_processes_of_a_node_copy_once(cache: Path, tmp_path: Path) -> None:
    folder, go = tmp_path / "disk", tmp_path / "go"
    processes = [begin(cache, folder, go, KILL_IN=str(folder), KILL_AT="never", KILL_LATER="0") for _ in range(4)]
    go.touch()
    said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len({lines[-1] for lines in said}) == 1, "all have the same data"
    assert sum("staged" in line for lines in said for line in lines) == 1
    assert sorted(writes(folder)) == sorted(Path(name).name for name in files(cache))


@pytest.mark.parametrize("write", ["other/case0", "tiny/case3", "other/index"])
def test_a_killed_copying_goes_on(cache: Path, tmp_path: Path, write: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, go = tmp_path / "disk", tmp_path / "go"
    place = place_of(cache, folder)
    go.touch()
    killed = begin(cache, folder, go, KILL_IN=str(folder), KILL_AT=f"os.rename .*{write}", KILL_LATER="0")
    killed.wait(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    there = {path: path.stat().st_ino for path in place.rglob("*.h5")}
    assert list(place.rglob("*.tmp")) and not list(place.rglob("index.json"))
    load_staged(options(cache), folder)
    assert {path: path.stat().st_ino for path in there} == there, "nothing was copied again"
    assert files(place) == files(cache)
    assert not list(place.rglob("*.tmp"))
    rest = CASES + 1 - len(there)
    assert not rest or f"staged {rest} of {rest} cases" in capsys.readouterr().out


def test_a_changed_cache_is_picked_up(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, folder = staged(cache, tmp_path / "disk"), tmp_path / "disk"
    make_cache(write_dataset(tmp_path / "new", ["case0", "case2", "case1", "case9"]), cache, SMALL)
    for name in ("case3", "case4"):
        (cache / "tiny" / f"{name}.h5").unlink()
    capsys.readouterr()
    stage(cache, place_of(cache, folder), ["tiny"])
    assert files(place_of(cache, folder)) == {name: content for name, content in files(cache).items() if "tiny" in name}
    after = staged(cache, folder)
    assert after.content_hash == load_cohort(options(cache, "tiny")).content_hash != before.content_hash
    assert "staged 3 of 3 cases (1 were there)" in capsys.readouterr().out


def test_two_caches_do_not_mix(cache: Path, sets: Path, tmp_path: Path) -> None:
    second = make_cache(sets / "tiny" / "dataset.yaml", tmp_path / "elsewhere" / "cache", WorkingGrid(size=8))
    hashes = [staged(one, tmp_path / "disk").content_hash for one in (cache, second, cache)]
    assert hashes == [load_cohort(options(one, "tiny")).content_hash for one in (cache, second, cache)]
    assert len({place_of(one, tmp_path / "disk") for one in (cache, second)}) == 2


def test_without_room_nothing_is_copied(cache: Path, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    os.truncate(cache / "tiny" / "case4.h5", free + 10**9)  # sparse: it takes no room
    with pytest.raises(
        StorageError, match=r"no room for 5 cases .* \d+ bytes \(.*\) needed, \d+ bytes .* free"
    ) as caught:
        staged(cache, tmp_path / "disk")
    assert caught.value.exit_code == 5
    needed, found = map(int, re.findall(r"(\d+) bytes", str(caught.value)))
    assert free + 10**9 < needed and found == pytest.approx(free, rel=0.1)
    assert not list((tmp_path / "disk").rglob("*.h5"))


def test_a_damaged_case_of_the_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    flip(cache / "tiny" / "case3.h5")
    with pytest.raises(IntegrityError, match=r"tiny/case3: .*do not match their content hash.*organseg prepare"):
        staged(cache, tmp_path / "disk")
    there = [path.name for path in (tmp_path / "disk").rglob("*") if path.is_file()]
    assert "index.json" not in there and "case3.h5" not in there


@pytest.mark.parametrize("name", ["case3.h5", "index.json"])
def test_what_is_missing_in_the_cache_is_named(cache: Path, tmp_path: Path, name: str) -> None:
    (cache / "tiny" / name).unlink()
    with pytest.raises((IntegrityError, UsageError), match=f"tiny.*{name.removesuffix('.h5')}|no data set tiny"):
        staged(cache, tmp_path / "disk")


def test_a_case_that_was_prepared_again_alone_is_refused(cache: Path, tmp_path: Path) -> None:
    shutil.copy(cache / "tiny" / "case1.h5", cache / "tiny" / "case0.h5")  # whole, but not what the index names
    with pytest.raises(IntegrityError, match=r"tiny/case0: .*changed since the last complete preparation"):
        staged(cache, tmp_path / "disk")


@pytest.mark.parametrize("place", [-1, 3, 600])
def test_a_damaged_copy_is_replaced(cache: Path, tmp_path: Path, place: int) -> None:
    staged(cache, tmp_path / "disk")
    (copy,) = (tmp_path / "disk").rglob("case2.h5")
    flip(copy, place)
    staged(cache, tmp_path / "disk")
    assert copy.read_bytes() == (cache / "tiny" / "case2.h5").read_bytes()
    os.truncate(copy, 700)
    staged(cache, tmp_path / "disk")
    assert copy.read_bytes() == (cache / "tiny" / "case2.h5").read_bytes()


def test_a_damaged_index_of_the_copy_is_replaced(cache: Path, tmp_path: Path) -> None:
    staged(cache, tmp_path / "disk")
    (index,) = (tmp_path / "disk").rglob("index.json")
    digests = json.loads(index.read_text())
    digests["cases"].pop("case1")
    for text in ("{", json.dumps(digests)):
        index.write_text(text)
        assert staged(cache, tmp_path / "disk").content_hash == load_cohort(options(cache, "tiny")).content_hash
        assert index.read_bytes() == (cache / "tiny" / "index.json").read_bytes()


def test_the_cache_itself_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache)
    before = sorted(tmp_path.rglob("*"))
    for folder in (cache, cache / "stage", tmp_path / "link", tmp_path / "link" / "deep" / "stage"):
        with pytest.raises(UsageError, match=r"is the cache .* or lies in it"):
            staged(cache, folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_made_is_told(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="choose another `stage`"):
        staged(cache, tmp_path / "file")


def test_the_lock_is_waited_for(cache: Path, tmp_path: Path) -> None:
    folder, go = tmp_path / "disk", tmp_path / "go"
    place = place_of(cache, folder)
    place.mkdir(parents=True)
    go.touch()
    with (place / ".lock").open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        process = begin(cache, folder, go)
        time.sleep(0.5)
        assert process.poll() is None and not list(place.rglob("*.h5"))
    assert process.wait(timeout=60) == 0
    assert process.stdout is not None and "staged 6 of 6 cases" in process.stdout.read()


def test_a_file_system_without_locks_will_do(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    stage(cache, place_of(cache, tmp_path / "disk"), ["tiny"])
    assert len(list((tmp_path / "disk").rglob("*.h5"))) == CASES
