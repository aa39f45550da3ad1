"""A curriculum on two gloo ranks: one network after each phase, one process's steps, each case relabelled once."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from rounds import CONFIGS, PHASES, TWO_RANKS, command, losses, pseudo_labels
from toy import TOY, organseg

from organseg.data.pseudo_labels import read_round_header

pytestmark = pytest.mark.slow

WATCHED = ("--trust-import", "watched", "--curriculum.rounds=1")
WITNESS = "--trainer.callbacks=[{class_path: watched.Witness}]"
EXACT = (
    # BatchNorm sees one rank's share; plain SGD, since Adam turns rounding in tiny gradients into whole steps.
    "--model.init_args.network.init_args.norm=instance",
    "--model.init_args.optimizer=torch.optim.SGD",
    "--model.init_args.optimizer.init_args.lr=1.0",
    "--model.init_args.optimizer.init_args.momentum=0.9",
    "--trainer.precision=32-true",
)
STEPS = "--trainer.max_steps=60"

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`watched` is found by the processes that a test starts."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def equal(one: State, other: State) -> bool:
    """Bit by bit: NaN equals NaN, 0 is not -0."""
    return one.keys() == other.keys() and all(
        one[name].contiguous().numpy().tobytes() == other[name].contiguous().numpy().tobytes() for name in one
    )


def state(run: Path, phase: str) -> State:
    found: State = torch.load(run / phase / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found


def test_ranks_hold_one_network_after_every_phase(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCH", str(tmp_path))
    run = tmp_path / "run"
    organseg(*command(toy, run, *WATCHED, *TWO_RANKS, WITNESS, "--curriculum.score=watched.WatchedConfidence",
                      "--curriculum.result=best", "--data.init_args.val_share=0.3",
                      "--data.init_args.label_share=0.6",
                      "--trainer.val_check_interval=20"))  # fmt: skip  # no training ends with a validation
    seen = []
    for phase in PHASES[0], PHASES[1], PHASES[3]:
        ranks = [torch.load(tmp_path / f"{phase}-trained-{rank}.pt", weights_only=True) for rank in (0, 1)]
        counted = [name for name in ranks[0] if "running_" in name or "num_batches" in name]
        weights = [{name: rank[name] for name in rank if name not in counted} for rank in ranks]
        assert counted and equal(*weights), phase
        assert equal(ranks[0], state(run, phase)), "rank 0's is what was saved"
        assert not any(equal(weights[0], other) for other in seen), "the phase has trained nothing"
        seen.append(weights[0])
        if phase != PHASES[1]:
            # Also the running statistics: what is validated is what was saved.
            for rank in (0, 1):
                validated = torch.load(tmp_path / f"{phase}-validated-{rank}.pt", weights_only=True)
                assert equal(validated, ranks[0]), (phase, rank)


@pytest.mark.alone
def test_a_rank_that_diverges_ends_the_run_with_6(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(toy, run, *WATCHED, *TWO_RANKS)
    done = organseg(*words, "--trainer.callbacks=[{class_path: watched.Diverge}]", check=6)
    assert done.stderr.count("the ranks hold different weights after step 3: 0 (") == 1
    checkpoint = torch.load(run / PHASES[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2


@pytest.mark.alone
def test_ranks_that_go_on_from_different_checkpoints_end_with_6(toy: Path, tmp_path: Path) -> None:
    words = command(toy, tmp_path / "run", *WATCHED, *TWO_RANKS)
    done = organseg(*words, "--trainer.callbacks=[{class_path: watched.Astray}]", check=6)
    assert done.stderr.count("the ranks disagree about the next phase or its checkpoint") == 1


@pytest.mark.alone
def test_a_rank_that_fails_alone_ends_the_run_and_says_why(toy: Path, tmp_path: Path) -> None:
    words = command(toy, tmp_path / "run", *WATCHED, *TWO_RANKS)
    done = organseg(*words, "--trainer.callbacks=[{class_path: watched.FailAlone}]", check=None)
    assert done.returncode != 0
    assert "organseg: a fault of this rank alone" in done.stderr


@pytest.fixture(scope="module")
def round0(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round 0 for all, of one process."""
    run = tmp_path_factory.mktemp("round0") / "run"
    organseg("fit", "--config", CONFIGS / "experiment" / "phantom_30_inerrant0.yaml", "--data.init_args.cache",
             toy / "cache", "--out", run, *TOY, *EXACT, STEPS)  # fmt: skip
    return run


def both(toy: Path, folder: Path, round0: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[int, Path]:
    """The same later phases by one process and by two ranks."""
    runs = {1: folder / "one", 2: folder / "two"}
    for ranks, run in runs.items():
        watch = folder / f"watch{ranks}"
        watch.mkdir()
        monkeypatch.setenv("WATCH", str(watch))
        words = command(toy, run, *WATCHED, *EXACT, STEPS, "--curriculum.round0", round0, "--curriculum.round_steps=3")
        organseg(*words, *more, *(TWO_RANKS if ranks == 2 else ()))
    return runs


def assert_same_way(one: State, two: State, start: State) -> None:
    """The ends differ by much less than the way that was made; a bias before a norm makes none but rounding."""
    ways = {name: float((one[name] - begin).abs().max()) for name, begin in start.items()}
    assert max(ways.values()) > 1e-4
    for name, way in ways.items():
        assert float((one[name] - two[name]).abs().max()) < 2e-3 * way + 1e-8, name


def logged(run: Path, name: str) -> list[float]:
    return [float(line.split(",")[2]) for line in losses(run) if f",{name}," in line]


def test_each_case_is_relabelled_once_and_alike_and_then_trains_as_one_process_does(
    toy: Path, tmp_path: Path, round0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = both(toy, tmp_path, round0, monkeypatch, "--curriculum.score=watched.WatchedProbability")
    assert pseudo_labels(runs[1]) == pseudo_labels(runs[2])
    folder = runs[2] / "pseudo_labels" / "round_1"
    keys = [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.h5")]
    assert sum(sum(read_round_header(folder, key).added) for key in keys) > 100
    # Who looked at what: together the slabs of one process, each once, and both ranks had work.
    alone = Counter((tmp_path / "watch1" / "slabs-0.txt").read_text().split())
    shared = [Counter((tmp_path / "watch2" / f"slabs-{rank}.txt").read_text().split()) for rank in (0, 1)]
    assert shared[0] + shared[1] == alone
    assert all(shared)

    start, phase = state(runs[1], PHASES[0]), PHASES[3]
    assert equal(start, state(runs[2], PHASES[0]))
    assert_same_way(state(runs[1], phase), state(runs[2], phase), start)
    assert logged(runs[2], "train/loss") == pytest.approx(logged(runs[1], "train/loss"), rel=1e-4)
    assert len(logged(runs[1], "train/loss")) == 3


def test_the_confidence_network_takes_the_steps_of_one_process(
    toy: Path, tmp_path: Path, round0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--curriculum.score=watched.PlainConfidence", "--curriculum.score.init_args.steps=3")
    runs = both(toy, tmp_path, round0, monkeypatch, *more)
    one, two = (state(run, PHASES[1]) for run in runs.values())
    network = {name.removeprefix("network."): tensor for name, tensor in state(runs[1], PHASES[0]).items()}
    start = {f"features.{name}": tensor for name, tensor in network.items() if f"features.{name}" in one}
    assert_same_way(one, two, start)
    head = [name for name in one if name.startswith("head.")]
    assert head
    for name in head:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)
    assert logged(runs[2], "confidence/loss") == pytest.approx(logged(runs[1], "confidence/loss"), rel=1e-4)
    assert len(logged(runs[1], "confidence/loss")) == 3


def test_the_judges_take_the_steps_of_one_process(
    toy: Path, tmp_path: Path, round0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = "--curriculum.score=organseg.curriculum.CrossFittedConfidence"
    runs = both(toy, tmp_path, round0, monkeypatch, score, "--curriculum.score.init_args.steps=3")
    one, two = (state(run, PHASES[1]) for run in runs.values())
    judges = [{name.partition(".")[2]: value for name, value in one.items() if name.startswith(who)} for who in
              ("first.", "second.")]  # fmt: skip
    assert judges[0] and judges[0].keys() == judges[1].keys() and not equal(*judges)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=name)
    found = logged(runs[1], "confidence/loss")
    assert logged(runs[2], "confidence/loss") == pytest.approx(found, rel=1e-4)
    assert len(found) == 3 and len(set(found)) == 3
    assert len(pseudo_labels(runs[2])) == len(pseudo_labels(runs[1])) > 0
