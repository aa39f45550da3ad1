"""Shards of a cohort meet in one index, whatever their order, and however often one is repeated."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import write_dataset

from organseg.data.cohort import read_index
from organseg.data.manifest import load_manifest
from organseg.data.prepare import prepare
from organseg.data.shards import CaseResults, Shard, forget_results
from organseg.errors import UsageError
from organseg.volumes import WorkingGrid

CASES = 5
SMALL = WorkingGrid(size=16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("set"), CASES)


def content(cache: Path) -> dict[str, bytes]:
    """All that training reads."""
    files = [path for path in (cache / "tiny").iterdir() if not path.name.startswith("shard_")]
    return {path.name: path.read_bytes() for path in files}


def run(dataset: Path, cache: Path, shard: str, grid: WorkingGrid = SMALL) -> list[str]:
    return [done.case for done in prepare(load_manifest(dataset), cache, grid, 1, Shard.parse(shard))]


def index(cache: Path) -> Path:
    return cache / "tiny" / "index.json"


@given(st.integers(1, 9), st.integers(0, 30))
def test_shards_are_a_partition(count, items):
    parts = [Shard(n, count).of(range(items)) for n in range(count)]
    assert sorted(item for part in parts for item in part) == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["", "1", "3/3", "-1/3", "0/0", "a/b", "1/2/3", "0.0/1", "\u0660/\u0661"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(UsageError, match="expected I/N"):
        Shard.parse(text)


def test_three_in_random_order_one_killed_and_repeated_are_as_one(dataset, tmp_path):
    run(dataset, tmp_path / "whole", "0/1")
    for seed in range(3):
        order = random.Random(seed).sample(range(3), 3)
        cache = tmp_path / str(seed)
        killed = prepare(load_manifest(dataset), cache, SMALL, 1, Shard(order[0], 3))
        next(killed)
        killed.close()  # after its first case, before its record
        for n in order[1:]:
            run(dataset, cache, f"{n}/3")
            assert not index(cache).exists()
        run(dataset, cache, f"{order[0]}/3")
        assert content(cache) == content(tmp_path / "whole")
        assert len(read_index(cache / "tiny")) == CASES


def test_a_repeated_shard_changes_nothing(dataset, tmp_path):
    for n in (1, 0, 1, 1):
        run(dataset, tmp_path, f"{n}/2")
    before = content(tmp_path)
    run(dataset, tmp_path, "0/2")
    assert content(tmp_path) == before


def test_more_shards_than_cases(dataset, tmp_path):
    done = [run(dataset, tmp_path, f"{n}/{CASES + 2}") for n in range(CASES + 2)]
    assert [len(part) for part in done] == [1] * CASES + [0, 0]
    assert len(read_index(tmp_path / "tiny")) == CASES


def test_shards_of_another_preparation_count_as_none(dataset, tmp_path):
    run(dataset, tmp_path, "0/2", WorkingGrid(size=8))
    run(dataset, tmp_path, "1/2")
    assert not index(tmp_path).exists()
    run(dataset, tmp_path, "0/3")
    assert not index(tmp_path).exists()
    run(dataset, tmp_path, "0/2")
    assert index(tmp_path).exists()


def test_a_damaged_record_counts_as_none(dataset, tmp_path):
    run(dataset, tmp_path, "0/2")
    (tmp_path / "tiny" / "shard_0_of_2.json").write_text("{")
    run(dataset, tmp_path, "1/2")
    assert not index(tmp_path).exists()


def test_a_shard_at_work_again_is_waited_for(dataset, tmp_path):
    for n in range(2):
        run(dataset, tmp_path, f"{n}/2")
    index(tmp_path).unlink()
    again = prepare(load_manifest(dataset), tmp_path, SMALL, 1, Shard(1, 2))
    next(again)  # its old record is gone
    run(dataset, tmp_path, "0/2")
    assert not index(tmp_path).exists()
    list(again)
    assert index(tmp_path).exists()


def test_a_refused_case_is_not_in_the_index(dataset, tmp_path):
    broken = tmp_path / "set"
    shutil.copytree(dataset.parent, broken)
    next(iter(sorted(broken.rglob("*case1*")))).write_bytes(b"")
    cache = tmp_path / "cache"
    for n in range(2):
        run(broken / dataset.name, cache, f"{n}/2")
    assert [case.path.stem for case in read_index(cache / "tiny")] == ["case0", "case2", "case3", "case4"]


def test_preparing_all_at_once_forgets_shards(dataset, tmp_path):
    run(dataset, tmp_path, "0/2")
    run(dataset, tmp_path, "0/1")
    assert not list((tmp_path / "tiny").glob("shard_*"))


KEYS = [f"tiny/case{number}" for number in range(CASES)]


def results(folder: Path, shard: str = "0/2", made_of: object = "a checkpoint") -> CaseResults:
    return CaseResults(folder, Shard.parse(shard), made_of)


def do(found: CaseResults, key: str, result: object = 1.0) -> Path:
    """A case with its file."""
    file = found.folder / "predictions" / f"{key}.nii.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(key)
    found.write(key, result, file)
    return file


def test_results_of_shards_meet(tmp_path):
    first, second = results(tmp_path, "0/2"), results(tmp_path, "1/2")
    assert (first.missing(KEYS), second.missing(KEYS)) == ([0, 2, 4], [1, 3])
    for key in KEYS[1::2]:
        do(second, key)
    assert first.read(KEYS) == dict.fromkeys(KEYS[1::2], 1.0)
    assert first.progress(KEYS, first.read(KEYS)) == "1 of 2 shards are complete, 2 of 5 cases are done"
    for key in KEYS[::2]:
        do(first, key)
    assert sorted(second.read(KEYS)) == KEYS and not first.missing(KEYS) and not second.missing(KEYS)


def test_a_number_comes_back_as_it_was(tmp_path):
    written = [[0.1 + 0.2, 1e-300, float("inf"), float("nan")]]
    do(results(tmp_path), KEYS[0], written)
    (read,) = results(tmp_path).read(KEYS).values()
    assert read[0][:3] == written[0][:3] and math.isnan(read[0][3])


@pytest.mark.parametrize("other", [("0/2", "another checkpoint"), ("0/3", "a checkpoint")])
def test_results_of_another_test_count_as_none(tmp_path, other):
    do(results(tmp_path), KEYS[0])
    found = results(tmp_path, *other)
    assert found.read(KEYS) == {} and 0 in found.missing(KEYS)


def test_a_case_whose_file_changed_is_done_again(tmp_path):
    found = results(tmp_path)
    for key in KEYS:
        file = do(found, key)
    file.write_text("another map")  # of case 4
    do(found, KEYS[2]).unlink()
    assert found.missing(KEYS) == [2, 4]


@pytest.mark.parametrize("damage", ["", "[]", "{}", None])
def test_a_damaged_result_counts_as_none(tmp_path, damage):
    found = results(tmp_path)
    do(found, KEYS[0])
    path = tmp_path / "shards" / f"{KEYS[0]}.json"
    document = json.loads(path.read_text())
    document["result"] = 0.5  # one bit of a number is enough
    path.write_text(json.dumps(document) if damage is None else damage)
    assert found.read(KEYS) == {} and 0 in found.missing(KEYS)


def test_a_result_is_of_its_case(tmp_path):
    found = results(tmp_path)
    do(found, KEYS[0])
    shutil.copy(tmp_path / "shards" / f"{KEYS[0]}.json", tmp_path / "shards" / f"{KEYS[2]}.json")
    assert list(found.read(KEYS)) == [KEYS[0]]


def test_forgotten_results_are_gone(tmp_path):
    file = do(results(tmp_path), KEYS[0])
    forget_results(tmp_path)
    forget_results(tmp_path)
    assert results(tmp_path).read(KEYS) == {} and file.exists()
