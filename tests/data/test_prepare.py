"""FAULTS.md section 2: the cache is whole, current and the same whoever made it, whatever was killed."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml
from synthetic import LABELS, SHAPE, SPACING, make_cache, make_case, write_dataset, write_label_map, write_scan

from organseg.data.cache import CachedCase, value_counts
from organseg.data.cohort import read_index
from organseg.data.manifest import load_manifest
from organseg.data.prepare import Prepared, prepare
from organseg.errors import IntegrityError, StorageError, UsageError, WorkerError
from organseg.files import publish
from organseg.processes import in_processes
from organseg.volumes import WorkingGrid, read_label, resample_image, resample_label

NATIVE = WorkingGrid()


def run(dataset: Path, cache: Path, grid: WorkingGrid = NATIVE, processes: int = 1) -> dict[str, Prepared]:
    return {case.case: case for case in prepare(load_manifest(dataset), cache, grid, processes)}


def made(results: dict[str, Prepared]) -> set[str]:
    return {case for case, result in results.items() if result.digest and not result.skipped}


def bytes_of(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def change(dataset: Path, **head: object) -> None:
    document = yaml.safe_load(dataset.read_text()) | head
    dataset.write_text(yaml.safe_dump(document, sort_keys=False))


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_dataset(tmp_path / "set", 3)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def test_a_prepared_case_holds_what_the_files_hold(dataset, cache):
    results = run(dataset, cache)
    assert list(results) == ["case0", "case1", "case2"]
    assert made(results) == set(results)
    case = CachedCase(cache / "tiny" / "case1.h5")
    image, label = make_case(1)
    arrays = case.arrays()
    assert (arrays.image == image).all()
    assert (arrays.label == np.select([label == value for value in sorted(LABELS)], range(1, 5))).all()
    assert arrays.source_label is None
    header = case.header
    assert (header.key, header.patient, header.modality) == ("tiny/case1", "tiny/case1", "CT")
    assert header.organs == header.annotated == ("liver", "left_kidney", "right_kidney", "spleen")
    assert header.spacing == header.source_spacing == SPACING
    assert header.source_shape == SHAPE
    assert header.preprocessing == {}
    assert [path.path.stem for path in read_index(cache / "tiny")] == ["case0", "case1", "case2"]
    assert names_in(cache / "tiny") == ["case0.h5", "case1.h5", "case2.h5", "fingerprint.json", "index.json"]


@pytest.mark.parametrize("grid", [NATIVE, WorkingGrid(size=16), WorkingGrid(spacing=(10.0, 18.0, 16.0))])
def test_what_is_current_is_skipped_and_not_touched(dataset, cache, grid):
    first = run(dataset, cache, grid)
    before, stamps = bytes_of(cache), {path: path.stat().st_mtime_ns for path in cache.rglob("*.h5")}
    again = run(dataset, cache, grid)
    assert made(again) == set()
    assert {case: result.digest for case, result in again.items()} == {c: r.digest for c, r in first.items()}
    assert bytes_of(cache) == before
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.h5")} == stamps


def test_goes_on_where_it_stopped(dataset, cache):
    cases = prepare(load_manifest(dataset), cache, NATIVE, 1)
    assert [next(cases).case, next(cases).case] == ["case0", "case1"]
    cases.close()
    with pytest.raises(IntegrityError, match="no readable index"):
        read_index(cache / "tiny")  # nothing says that it is complete
    assert made(run(dataset, cache)) == {"case2"}
    assert bytes_of(cache) == bytes_of(make_cache(dataset, cache.parent / "fresh"))


def test_a_refused_case_does_not_stop_the_others_and_is_not_listed(dataset, cache):
    run(dataset, cache)
    label = make_case(1)[1]
    label[0, 0, 0] = 99
    write_label_map(dataset.parent / "case1_label.nii.gz", label)
    results = run(dataset, cache)
    assert results["case1"].digest == ""
    assert [fault.found for fault in results["case1"].faults] == ["99"]
    assert results["case0"].skipped and results["case2"].skipped
    assert [case.path.stem for case in read_index(cache / "tiny")] == ["case0", "case2"]
    assert not (cache / "tiny" / "case1.h5").exists()  # what was prepared from the old label must not be trained on


def test_a_changed_label_is_seen_though_size_and_time_are_the_same(dataset, cache):
    document = yaml.safe_load(dataset.read_text())
    document["cases"][0]["label"] = "plain.nii"
    dataset.write_text(yaml.safe_dump(document))
    path = dataset.parent / "plain.nii"
    label = make_case(0)[1]
    write_label_map(path, label)
    run(dataset, cache)
    before = path.stat()
    label[tuple(np.argwhere(label)[0])] = 0
    write_label_map(path, label)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert made(run(dataset, cache)) == {"case0"}
    assert ((CachedCase(cache / "tiny" / "case0.h5").arrays().label > 0) == (label > 0)).all()


@pytest.mark.parametrize(
    ("head", "annotated"),
    [
        ({"hide": ["spleen"]}, ("liver", "left_kidney", "right_kidney")),
        ({"annotated": ["liver"], "hide": ["spleen", "left_kidney", "right_kidney"]}, ("liver",)),
        ({"labels": {2: "liver", 3: "left_kidney", 5: "right_kidney", 7: "spleen", 9: "heart"}}, None),
        ({"modality": "MR"}, None),
    ],
)
def test_what_the_manifest_says_otherwise_is_prepared_anew(dataset, cache, head, annotated):
    run(dataset, cache)
    change(dataset, **head)
    assert made(run(dataset, cache)) == {"case0", "case1", "case2"}
    fresh = make_cache(dataset, cache.parent / "fresh")
    assert bytes_of(cache) == bytes_of(fresh)
    if annotated:
        case = CachedCase(cache / "tiny" / "case0.h5")
        assert case.header.annotated == annotated
        values = [1 + case.header.organs.index(organ) for organ in annotated]
        assert set(np.unique(case.arrays().label)) == {0, *values}


def test_a_patient_or_one_case_that_changes(dataset, cache):
    run(dataset, cache)
    document = yaml.safe_load(dataset.read_text())
    document["cases"][1]["patient"] = "p7"
    document["cases"][2]["hide"] = ["liver"]
    dataset.write_text(yaml.safe_dump(document))
    assert made(run(dataset, cache)) == {"case1", "case2"}
    assert CachedCase(cache / "tiny" / "case1.h5").header.patient == "p7"


def test_other_options_are_prepared_anew(dataset, cache):
    for grid in (NATIVE, WorkingGrid(size=16), WorkingGrid(spacing=(10, 10, 10)), WorkingGrid(spacing=(10, 10, 11))):
        assert made(run(dataset, cache, grid)) == {"case0", "case1", "case2"}


def test_a_damaged_case_is_prepared_anew(dataset, cache):
    run(dataset, cache)
    before = bytes_of(cache)
    path = cache / "tiny" / "case2.h5"
    path.write_bytes(path.read_bytes()[:-1])
    assert made(run(dataset, cache)) == {"case2"}
    assert bytes_of(cache) == before


@pytest.mark.parametrize("kind", ["folder", "fifo", "gone"])
def test_a_source_that_is_no_file_any_more_is_refused_without_waiting(dataset, cache, kind):
    run(dataset, cache)
    manifest = load_manifest(dataset)
    path = dataset.parent / "case0.nii.gz"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    signal.alarm(60)  # reading a FIFO would wait for ever
    results = list(prepare(manifest, cache, NATIVE, 1))
    signal.alarm(0)
    assert [bool(result.digest) for result in results] == [False, True, True]
    assert results[0].faults[0].path == "case0.nii.gz"


@pytest.mark.parametrize(
    ("grid", "shape"),
    [(WorkingGrid(size=16), (12, 16, 16)), (WorkingGrid(spacing=(20.0, 9.0, 12.0)), (6, 32, 21))],
)
def test_a_resampled_case_keeps_its_source_label(dataset, cache, grid, shape):
    run(dataset, cache, grid)
    case = CachedCase(cache / "tiny" / "case0.h5")
    image, label = make_case(0)
    label = np.select([label == value for value in sorted(LABELS)], range(1, 5)).astype(np.uint8)
    arrays, header = case.arrays(), case.header
    assert arrays.image.shape == arrays.label.shape == shape
    assert (arrays.image == resample_image(image, shape)).all()
    assert (arrays.label == resample_label(label, shape)).all()
    assert (case.source_label() == label).all()
    # The extent in mm stays: 12 x 10, 32 x 9, 32 x 8.
    assert header.spacing == pytest.approx([120 / shape[0], 288 / shape[1], 256 / shape[2]])
    assert header.source_spacing == SPACING
    assert header.source_shape == SHAPE
    assert case.organ_counts.sum(0).tolist() == [int((arrays.label == k).sum()) for k in range(1, 5)]


def test_a_size_that_the_scan_has_changes_nothing_but_the_options(dataset, cache):
    run(dataset, cache, WorkingGrid(size=32))
    case = CachedCase(cache / "tiny" / "case0.h5")
    assert case.arrays().source_label is None
    assert (case.arrays().image == make_case(0)[0]).all()
    assert case.header.preprocessing == {"size": 32}


def test_any_number_of_processes_gives_the_same_bytes(dataset, cache):
    run(dataset, cache, processes=2)
    assert bytes_of(cache) == bytes_of(make_cache(dataset, cache.parent / "alone"))


def test_a_place_that_cannot_be_written(dataset, cache):
    cache.mkdir()
    (cache / "tiny").write_text("a file")
    with pytest.raises(StorageError, match="cannot be made"):
        run(dataset, cache)
    assert (cache / "tiny").read_text() == "a file"


def test_what_a_killed_process_left_is_removed(dataset, cache):
    folder = cache / "tiny"
    folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        publish(folder / "case0.h5", lambda file: file.write(b"half") and os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(folder.glob(".case0.h5.*.tmp"))) == 1
    run(dataset, cache)
    assert names_in(folder) == ["case0.h5", "case1.h5", "case2.h5", "fingerprint.json", "index.json"]


def command(dataset: Path, cache: Path, processes: int) -> subprocess.Popen[bytes]:
    arguments = ["prepare", str(dataset), "--out", str(cache), "--processes", str(processes)]
    words = [sys.executable, "-m", "organseg", *arguments]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def test_two_preparers_at_once(dataset, cache):
    running = [command(dataset, cache, 1) for _ in range(2)]
    assert [process.wait(300) for process in running] == [0, 0]
    assert bytes_of(cache) == bytes_of(make_cache(dataset, cache.parent / "alone"))


def living(session: int) -> list[str]:
    """Names of the processes of a session that have not ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, fields = (process / "stat").read_text().rpartition(")")[::2]
        except OSError:
            continue
        state, _, _, its_session = fields.split()[:4]
        if int(its_session) == session and state not in "ZX":
            found.append(name)
    return found


@pytest.mark.slow
def test_killed_at_any_moment_the_next_run_completes_the_same_cache_and_nobody_stays(tmp_path):
    dataset = write_dataset(tmp_path / "set", 6, shape=(24, 96, 96))
    expected = bytes_of(make_cache(dataset, tmp_path / "expected"))
    for moment in (0, 2, 4):  # cases published when the kill comes
        cache = tmp_path / f"cache{moment}"
        process = command(dataset, cache, 2)
        while process.poll() is None and len(list(cache.glob("tiny/*.h5"))) < moment + 1:
            time.sleep(0.001)
        process.kill()
        process.wait()
        for path in cache.glob("tiny/*.h5"):
            assert CachedCase(path).digest  # what has its name is whole
        deadline = time.monotonic() + 30
        while living(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert living(process.pid) == []
        results = run(dataset, cache)
        assert len(results) == 6
        assert bytes_of(cache) == expected


def test_an_unlabelled_case(tmp_path):
    dataset = write_dataset(tmp_path / "set", 1, entries={"case0": {"label": None}})
    run(dataset, tmp_path / "cache")
    case = CachedCase(tmp_path / "cache" / "tiny" / "case0.h5")
    assert case.header.annotated == ()
    assert case.header.label_sha256 == ""
    assert not case.arrays().label.any()


def test_warnings_reach_the_caller(dataset, cache):
    image, label = make_case(0)
    write_scan(dataset.parent / "case0.nii.gz", image)
    write_label_map(dataset.parent / "case0_label.nii.gz", np.where(label == 7, 0, label).astype(np.uint8))
    assert [str(fault.found) for fault in run(dataset, cache)["case0"].faults] == ["no voxel"]


def test_integers_that_mean_something_else_are_not_current(dataset, cache):
    run(dataset, cache)
    labels = {value + 100: organ for value, organ in LABELS.items()}
    change(dataset, labels=labels)
    results = run(dataset, cache)
    assert all(not prepared.digest for prepared in results.values())
    assert any("label values" in str(fault) for prepared in results.values() for fault in prepared.faults)


def test_another_data_set_of_the_same_name_is_not_replaced(dataset, cache, tmp_path):
    run(dataset, cache)
    before = bytes_of(cache)
    other = write_dataset(tmp_path / "other", ["x0", "x1"], seed=9)
    with pytest.raises(UsageError, match=r"another data set named 'tiny' is prepared here.*case0, case1"):
        run(other, cache)
    assert bytes_of(cache) == before
    fewer = write_dataset(tmp_path / "set", 2)  # one case less is the same data set still
    run(fewer, cache)
    assert [case.path.stem for case in read_index(cache / "tiny")] == ["case0", "case1"]


def test_a_grid_of_too_many_voxels_is_refused_before_it_is_filled(dataset, cache):
    results = run(dataset, cache, WorkingGrid(None, (10.0, 0.001, 0.001)))
    fault = results["case0"].faults[0]
    assert (fault.field, fault.found, fault.refused) == ("working grid", "12 x 288000 x 256000", True)
    assert "--spacing" in fault.remedy


def test_a_cache_without_permission_is_told_before_anything_is_decoded(dataset, cache, monkeypatch):
    run(dataset, cache)
    monkeypatch.setattr("organseg.data.prepare.os.access", lambda path, mode: False)  # root may write everywhere
    monkeypatch.setattr("organseg.data.prepare.prepare_case", lambda *_: pytest.fail("decoded"))
    with pytest.raises(StorageError, match=r"cannot be written.*--out"):
        run(dataset, cache)


def test_a_label_that_changes_while_it_is_read_is_another_one_next_time(dataset, cache, monkeypatch):
    label = dataset.parent / "case0_label.nii.gz"
    later = make_case(8)[1]

    def read_and_change(*arguments, **options):
        found = read_label(*arguments, **options)
        write_label_map(label, later)
        return found

    with monkeypatch.context() as patched:
        patched.setattr("organseg.data.check.read_label", read_and_change)
        run(dataset, cache)
    assert "case0" in made(run(dataset, cache))
    found = CachedCase(cache / "tiny" / "case0.h5").arrays().label
    assert ((found > 0) == (later > 0)).all()


def test_a_killed_worker_is_one_line(dataset, cache):
    with pytest.raises(WorkerError, match=r"worker processes was killed.*fewer --processes"):
        list(in_processes(os._exit, [9, 9, 9], 2))


def test_counting_values_takes_no_copy_of_a_scan():
    label = np.full((64, 256, 256), 3, dtype=np.uint8)
    tracemalloc.start()
    counts = value_counts(label)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts[3] == label.size and counts.sum() == label.size
    assert peak < label.nbytes / 2  # as int64 it would be eight times as large
