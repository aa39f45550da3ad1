"""`kill -9` between any two writes of a curriculum, and at any moment: the same command ends as if nothing had been."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rounds import PHASES, TWO_RANKS, command, journal, killed_after, killed_at, losses, results
from toy import organseg

ONE_ROUND = "--curriculum.rounds=1"


def assert_as(run: Path, whole: Path, what: str = "") -> None:
    assert results(run) == results(whole), what
    assert journal(run) == journal(whole), what
    assert losses(run) == losses(whole), what


@pytest.fixture(scope="module")
def one_round(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one_round") / "run"
    organseg(*command(toy, run, ONE_ROUND))
    return run


@pytest.mark.slow
def test_killed_before_and_after_every_journal_line(toy: Path, one_round: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(toy, run, ONE_ROUND)
    # A step's checkpoint is published, and the numbers of that step come to no harm.
    assert killed_at(words, run, f"os.rename {PHASES[0]}/checkpoints/last.ckpt$", later=1)
    for number, phase in enumerate(PHASES[:4]):
        # Its result is published, its line is not written: the phase does not count.
        assert killed_at(words, run, "open journal.jsonl")
        made = run / "pseudo_labels/round_1" if "relabel" in phase else run / phase / "checkpoints/last.ckpt"
        assert made.exists() and journal(run) == PHASES[:number]
        # The line is written, and nothing else since.
        assert killed_at(words, run, "open journal.jsonl", later=1)
        assert journal(run) == PHASES[: number + 1]
    # All phases are done: between any two writes that publish the run's result.
    later = 0
    while killed_at(words, run, "open checkpoints/", later):
        later += 1
    assert later >= 6
    assert_as(run, one_round)


@pytest.mark.slow
def test_killed_between_the_writes_that_take_over_round_0(toy: Path, one_round: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(toy, run, ONE_ROUND, "--curriculum.round0", one_round)
    for later in range(7):
        # Two hash lists and the checkpoint, each opened and renamed, and the journal's line.
        assert killed_at(words, run, f"open {PHASES[0]}/checkpoints/", later)
        assert journal(run) == []
    assert killed_at(words, run, "open journal.jsonl", later=1)
    assert journal(run) == PHASES[:1]
    # From here on the other run may be gone or gone on: what was taken over is this run's own.
    moved = one_round.rename(one_round.with_name("moved"))
    try:
        organseg(*words)
    finally:
        moved.rename(one_round)
    found = results(run)
    assert found == results(one_round) and journal(run) == PHASES[:4]


@pytest.mark.slow
def test_killed_between_two_cases_only_the_rest_is_relabelled(toy: Path, one_round: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(toy, run, ONE_ROUND, "--curriculum.round0", one_round)
    # The first case's file has its name, the second one's is about to be begun.
    assert killed_at(words, run, "os.rename pseudo_labels/round_1/", later=1)
    (first,) = (run / "pseudo_labels").rglob("[!.]*.h5")
    before = first.stat().st_mtime_ns
    organseg(*words)
    assert len(list((run / "pseudo_labels").rglob("*.h5"))) > 1
    assert first.stat().st_mtime_ns == before
    assert results(run) == results(one_round)


@pytest.fixture(scope="module")
def whole(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, float]]:
    """Of one or two ranks: the uninterrupted run, and the seconds that its phases take."""
    made: dict[int, tuple[Path, float]] = {}

    def run_of(ranks: int) -> tuple[Path, float]:
        if ranks not in made:
            run = tmp_path_factory.mktemp("whole") / "run"
            organseg(*command(toy, run, *TWO_RANKS * (ranks == 2)))
            begun, ended = (run / name for name in (".lock", "run.json"))
            made[ranks] = run, ended.stat().st_mtime - begun.stat().st_mtime
        return made[ranks]

    return run_of


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(24))
def test_killed_at_random(seed: int, toy: Path, whole: Callable[[int], tuple[Path, float]], tmp_path: Path) -> None:
    rng = np.random.default_rng([seed, 11])
    ranks, workers = 1 + seed % 2, 2 * (seed // 2 % 2)
    reference, takes_s = whole(ranks)
    run, kills = tmp_path / "run", []
    for _ in range(6):
        # Either at a moment, or between two writes.
        words = command(toy, run, f"--data.init_args.workers={workers}", *TWO_RANKS * (ranks == 2))
        delay, writes = float(rng.uniform(0, 0.2 * takes_s)), int(rng.integers(120))
        by_time = bool(rng.integers(2))
        if not (killed_after(words, run, delay) if by_time else killed_at(words, run, "", writes)):
            break
        kills.append(f"{delay:.2f} s" if by_time else f"{writes} writes")
    else:
        organseg(*words)
    what = f"seed {seed}, {ranks} ranks, {workers} workers, killed after {', '.join(kills)}"
    assert kills, what
    assert_as(run, reference, what)
    print(what)
