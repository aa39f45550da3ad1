"""Tables of a test, whoever scored its cases: one process, or shards that end in any order."""

import csv
import itertools
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest

from organseg.batch import WholeCase
from organseg.data.shards import CaseResults, Shard
from organseg.errors import IntegrityError
from organseg.methods.evaluation import CaseEvaluation

KEYS = [f"tiny/case{number}" for number in range(4)]
ORGANS = ("liver", "spleen")


def evaluation(run: Path, shard: str = "0/1", checkpoint: str = "one", **options: float) -> CaseEvaluation:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, default_root_dir=run,
                        **options)  # fmt: skip
    part = Shard.parse(shard)
    results = CaseResults(run / "test", part, checkpoint) if part.count > 1 else None
    trainer.datamodule = SimpleNamespace(results=results)
    return CaseEvaluation(KEYS, ORGANS, trainer)


def score(some: CaseEvaluation, *numbers: int, seed: int = 0) -> None:
    for number in numbers:
        rng = np.random.default_rng([number, seed])
        truth, preds = (rng.integers(0, 3, (4, 6, 5)).astype(np.uint8) for _ in range(2))
        case = WholeCase(KEYS[number], number, truth, lambda image: image, (4, 6, 5), (3.0, 0.7, 0.9), np.eye(4),
                         truth, np.array([True, number != 2]))  # fmt: skip
        some.add(case, preds)


def tables(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "test").glob("*.csv")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("whole")
    alone = evaluation(run)
    score(alone, *range(4))
    assert set(alone.finish()) == {"test/dsc/liver", "test/dsc/spleen", "test/dsc/mean"}
    return tables(run)


def test_scores_keep_all_their_digits(whole: dict[str, bytes]) -> None:
    rows = list(csv.DictReader(whole["cases.csv"].decode().splitlines()))
    assert [row["case"] for row in rows] == [key for key in KEYS for _ in ORGANS]
    assert float(rows[0]["diagonal_mm"]) == float(np.linalg.norm(np.array((4, 6, 5)) * (3.0, 0.7, 0.9)))


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_the_last_of_three_shards_writes_the_tables(
    order: tuple[int, ...], whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for done, index in enumerate(order, start=1):
        assert tables(tmp_path) == {}
        shard = evaluation(tmp_path, f"{index}/3")
        score(shard, *range(4)[index::3])
        values = shard.finish()
        assert bool(values) == (done == 3)
        assert done == 3 or f"{done} of 3 shards are complete" in capsys.readouterr().out
    assert tables(tmp_path) == whole


def test_shards_that_end_at_the_same_moment_meet(whole: dict[str, bytes], tmp_path: Path) -> None:
    both = [evaluation(tmp_path, f"{index}/2") for index in range(2)]
    for index, shard in enumerate(both):
        score(shard, *range(4)[index::2])
    for shard in both:
        shard.finish()
        assert tables(tmp_path) == whole
        for path in (tmp_path / "test").glob("*.csv"):
            path.unlink()


def test_a_shard_with_nothing_left_to_do_writes_the_tables(whole: dict[str, bytes], tmp_path: Path) -> None:
    for index in range(2):
        shard = evaluation(tmp_path, f"{index}/2")
        score(shard, *range(4)[index::2])
    evaluation(tmp_path, "0/2").finish()
    assert tables(tmp_path) == whole


def test_old_tables_go_before_the_first_label_map_is_replaced(tmp_path: Path) -> None:
    alone = evaluation(tmp_path)
    score(alone, *range(4))
    alone.finish()
    shard = evaluation(tmp_path, "0/2", "two")
    assert len(tables(tmp_path)) == 2
    score(shard, 0)
    assert tables(tmp_path) == {}


def test_shards_of_another_checkpoint_do_not_meet(tmp_path: Path) -> None:
    for index, checkpoint in enumerate(["one", "two"]):
        shard = evaluation(tmp_path, f"{index}/2", checkpoint)
        score(shard, *range(4)[index::2])
        assert shard.finish() == {}
    assert tables(tmp_path) == {}


def test_all_cases_at_once_forget_what_shards_did(whole: dict[str, bytes], tmp_path: Path) -> None:
    score(evaluation(tmp_path, "0/2"), 0, 2)
    alone = evaluation(tmp_path)
    assert not list((tmp_path / "test").rglob("*.json"))
    score(alone, *range(4))
    alone.finish()
    assert tables(tmp_path) == whole


def test_a_case_that_was_left_out_is_no_end(tmp_path: Path) -> None:
    alone, shard = evaluation(tmp_path), evaluation(tmp_path, "0/2")
    score(alone, 0, 1, 2)
    with pytest.raises(RuntimeError, match=r"case3.* not scored exactly once"):
        alone.finish()
    score(shard, 0)
    with pytest.raises(IntegrityError, match="tiny/case2: no result"):
        shard.finish()


def test_a_test_of_some_batches_is_no_error(tmp_path: Path) -> None:
    shard, alone = (evaluation(tmp_path / part[-1], part, limit_test_batches=1) for part in ("0/2", "0/1"))
    score(shard, 0)
    assert shard.finish() == {}
    score(alone, 0)
    assert alone.finish()
