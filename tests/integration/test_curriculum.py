"""One `fit` with rounds: its phases, its result, and that killing it anywhere changes nothing (FAULTS.md 5, 6)."""

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rounds import CONFIGS, PHASES, TWO_RANKS, command, journal, losses, pseudo_labels, results, stop_when, weights
from toy import TOY, organseg

from organseg.checkpoints import load_checkpoint
from organseg.runtime.checkpoint_io import save_checkpoint


@pytest.fixture(scope="module")
def uninterrupted(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("curriculum") / "run"
    organseg(*command(toy, run), cold=True)  # another interpreter than those that are compared with it
    return run


@pytest.mark.slow
def test_phases_results_and_reports(toy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = uninterrupted
    assert journal(run) == PHASES
    last = run / "checkpoints" / "last.ckpt"
    assert weights(last) == weights(run / PHASES[-1] / "checkpoints" / "last.ckpt")
    assert len({weights(run / phase / "checkpoints" / "last.ckpt") for phase in PHASES if "train" in phase}) == 3
    # Every optimiser step has a place of its own on one axis: 50 + 2 (5 + 5).
    steps = [int(line.split(",")[0]) for line in losses(run)[1:]]
    assert steps == list(range(70))
    with (run / "02_round1_relabel" / "organs.csv").open() as file:
        first = {row["organ"]: row for row in csv.DictReader(file)}
    with (run / "05_round2_relabel" / "cases.csv").open() as file:
        cases = list(csv.DictReader(file))
    assert any(int(row["added"]) for row in first.values())
    for row in first.values():
        assert int(row["added"]) <= int(row["candidates"])
    assert all(int(row["right"]) <= int(row["added"]) for row in cases)
    done = organseg(*command(toy, run))
    assert "nothing to do" in done.stdout
    organseg("test", "--config", run / "config.yaml", "--ckpt_path", last)
    organseg("predict", "--ckpt_path", last, "--input", toy / "phantoms" / "img" / "phantom_000.nii.gz",
             "--out", tmp_path / "out")  # fmt: skip
    assert (tmp_path / "out" / "phantom_000.nii.gz").exists()


@pytest.mark.slow
def test_round_0_is_a_run_without_rounds_and_can_be_taken_over(toy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    plain, run = tmp_path / "plain", tmp_path / "run"
    base = command(toy, plain)
    at = base.index(str(CONFIGS / "experiment" / "phantom_30_inerrant_thesis.yaml"))
    alone = [word for word in base if not word.startswith("--curriculum")]
    alone[at] = str(CONFIGS / "experiment" / "phantom_30_inerrant0.yaml")
    organseg(*alone)
    assert weights(plain / "checkpoints" / "last.ckpt") == results(uninterrupted)[f"{PHASES[0]}/checkpoints/last.ckpt"]
    organseg(*command(toy, run, "--curriculum.round0", plain))
    assert journal(run) == PHASES
    assert results(run) == results(uninterrupted)
    other = organseg(*command(toy, tmp_path / "other", "--curriculum.round0", plain, "--seed=1"), check=4)
    assert "not the round 0 of this run" in other.stderr and "seed" in other.stderr


def moments(run: Path) -> list[Callable[[], bool]]:
    """Training, confidence, relabelling, an edge, and the last training, in the order in which they come."""

    def logged(step: int) -> Callable[[], bool]:
        return lambda: (run / "metrics.csv").exists() and f"\n{step}," in (run / "metrics.csv").read_text()

    return [
        logged(20),
        logged(52),
        lambda: any((run / "pseudo_labels" / "round_1").rglob("*.h5")),
        lambda: PHASES[2] in journal(run),
        lambda: PHASES[4] in journal(run),
        logged(67),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.faults), 2])
def test_kill_9_in_every_phase(workers: int, toy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(toy, run, f"--data.init_args.workers={workers}")
    for moment in moments(run):
        assert stop_when(words, moment, signal.SIGKILL) == -signal.SIGKILL
    organseg(*words)
    assert journal(run) == PHASES
    assert results(run) == results(uninterrupted)
    assert losses(run) == losses(uninterrupted)


@pytest.mark.slow
def test_a_signal_in_training_and_in_relabelling_is_exit_75(toy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(toy, run)
    training, _, relabelling, *_ = moments(run)
    assert stop_when(words, training, signal.SIGTERM) == 75
    assert stop_when(words, relabelling, signal.SIGTERM) == 75
    organseg(*words)
    assert results(run) == results(uninterrupted)
    assert losses(run) == losses(uninterrupted)


@pytest.mark.slow
def test_a_signal_amid_a_case_is_not_kept_waiting(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # of `watched`
    monkeypatch.setenv("WATCH", str(tmp_path))
    run = tmp_path / "run"
    words = command(toy, run, "--trust-import", "watched", "--curriculum.rounds=1")
    slow = [word for word in words if not word.startswith("--curriculum.score")]
    viewed = (tmp_path / "viewed").exists
    assert stop_when([*slow, "--curriculum.score=watched.SlowProbability"], viewed, signal.SIGTERM) == 75
    assert journal(run) == PHASES[:1]
    assert not list((run / "pseudo_labels").rglob("*"))  # the case is not finished first


@pytest.mark.slow
def test_all_cases_are_relabelled_whatever_prediction_is_limited_to(
    toy: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    organseg(*command(toy, run, "--trainer.limit_predict_batches=1", "--curriculum.round0", uninterrupted))
    assert len(pseudo_labels(run)) > 2 and pseudo_labels(run) == pseudo_labels(uninterrupted)


@pytest.mark.slow
def test_a_changed_pseudo_label_file_is_refused_until_it_is_made_again(
    toy: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = command(toy, run)
    stop_when(words, lambda: PHASES[5] in journal(run), signal.SIGKILL)
    file = next((run / "pseudo_labels" / "round_2").rglob("*.h5"))
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    done = organseg(*words, check=4)
    assert f"{file.name}: changed or removed since {PHASES[5]}" in done.stderr
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    (run / "journal.jsonl").write_text("".join(line for line in lines if PHASES[5] not in line))
    organseg(*words)
    assert results(run) == results(uninterrupted)


@pytest.mark.slow
def test_overwrite_starts_anew_and_keeps_what_it_makes_itself(toy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop_when(command(toy, run, "--seed=1"), lambda: PHASES[2] in journal(run), signal.SIGKILL)
    organseg(*command(toy, run, "--overwrite"))
    assert journal(run) == PHASES
    assert results(run) == results(uninterrupted)
    assert not list(run.rglob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("score", [None, "LearnedConfidence", "CrossFittedConfidence"])
def test_a_softmax_is_relabelled_too(toy: Path, tmp_path: Path, score: str | None) -> None:
    run = tmp_path / "run"
    learned = ["--curriculum.score", f"organseg.curriculum.{score}", "--curriculum.score.init_args.steps=2"]
    organseg("fit", "--config", CONFIGS / "experiment" / "btcv_100_utransformer.yaml", "--out", run,
             "--data.init_args.cache", toy / "cache", "--data.init_args.datasets=[phantom]", "--trainer.max_steps=50",
             "--data.init_args.label_share=0.5", "--model.init_args.network.width=4",
             *(word for word in TOY if "network" not in word), "--curriculum.rounds=1", "--curriculum.round_steps=2",
             *(learned if score else ["--curriculum.score=mcp"]))  # fmt: skip
    with next(run.glob("*_relabel/organs.csv")).open() as file:
        assert any(int(row["added"]) for row in csv.DictReader(file))


@pytest.mark.slow
def test_nothing_to_relabel_is_said_at_once(toy: Path, tmp_path: Path) -> None:
    done = organseg(*command(toy, tmp_path / "run", "--data.init_args.label_share=1.0"), check=2)
    assert "nothing to relabel" in done.stderr


@pytest.mark.slow
def test_a_network_that_finds_nothing_stops(toy: Path, tmp_path: Path) -> None:
    done = organseg(*command(toy, tmp_path / "run", "--trainer.max_steps=1"), check=7)
    assert "no candidate of any unlabelled organ" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("change", "changed"), [
    ("--curriculum.start=previous", {PHASES[6]}),
    ("--curriculum.accumulate=true", {"pseudo_labels/round_2", PHASES[6]}),
    ("--curriculum.lr_share=0.25", {PHASES[3], PHASES[4], PHASES[6]}),
])  # fmt: skip
def test_options_change_the_later_rounds(
    change: str, changed: set[str], toy: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    organseg(*command(toy, run, change, "--curriculum.round0", uninterrupted))
    found, plain = results(run), results(uninterrupted)
    differ = {"/".join(name.split("/")[: 1 + (name[0] == "p")]) for name in plain if found[name] != plain[name]}
    first = PHASES.index(min(changed & {*PHASES}))
    assert changed <= differ and not differ & {*PHASES[:first], "pseudo_labels/round_1"}


@pytest.mark.slow
def test_from_scratch_only_the_training_is_another(toy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    organseg(*command(toy, run, "--curriculum.start=scratch", "--curriculum.rounds=1", "--curriculum.gamma_max=0.335",
                      "--curriculum.round0", uninterrupted))  # fmt: skip
    found, plain = results(run), results(uninterrupted)
    last = "checkpoints/last.ckpt"
    assert {name for name in found if found[name] != plain[name]} == {last, f"{PHASES[3]}/{last}"}


@pytest.mark.slow
def test_the_best_round_is_chosen_on_validation_cases(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # A round of one step from new weights: the first training is the better one.
    words = ("--curriculum.result=best", "--data.init_args.val_share=0.3", "--data.init_args.label_share=0.6",
             "--curriculum.rounds=1", "--curriculum.start=scratch", "--curriculum.round_steps=1")  # fmt: skip
    organseg(*command(toy, run, *words))
    entries = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines() if line]
    scores = {entry["phase"]: entry["score"] for entry in entries if "train" in entry["phase"]}
    assert [*scores] == [PHASES[0], PHASES[3]] and all(0 <= score <= 1 for score in scores.values())
    best = max(scores, key=lambda phase: scores[phase])
    assert best == PHASES[0]
    assert weights(run / "checkpoints" / "last.ckpt") == weights(run / best / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_the_best_round_needs_a_validation_case_that_knows_something(toy: Path, tmp_path: Path) -> None:
    done = organseg(*command(toy, tmp_path / "run", "--curriculum.result=best"), check=2)
    assert "val_share" in done.stderr


JUDGED = (
    "--curriculum.score=organseg.curriculum.CrossFittedConfidence",
    "--curriculum.score.init_args.steps=10",
    "--curriculum.selection={threshold: 0.3, smooth_mm: 8.0, largest_piece: true, max_volume: 1.0}",
)


@pytest.mark.slow
def test_judges_are_trained_once_and_serve_every_round(toy: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    organseg(*command(toy, whole, *JUDGED))
    phases = [phase for phase in PHASES if phase != PHASES[4]]
    assert journal(whole) == phases
    with (whole / PHASES[5] / "organs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["score_auc"]]
    assert any(row["score_auc"] != row["probability_auc"] for row in rows)
    words = command(toy, run, *JUDGED)
    steps = [53, 60]  # in the judges' training; in the training after it
    for step in steps:
        stop_when(words, lambda step=step: f"\n{step}," in log(run), signal.SIGKILL)
        assert not (run / "checkpoints" / "last.ckpt").exists()
    organseg(*words)
    assert journal(run) == phases
    assert results(run) == results(whole)
    assert losses(run) == losses(whole)

    # What the trained judges know decides: others choose other voxels.
    judges = run / PHASES[1] / "checkpoints" / "last.ckpt"
    content = load_checkpoint(judges)
    content["state_dict"] = {name: tensor.roll(1) for name, tensor in content["state_dict"].items()}
    save_checkpoint(content, judges)
    (run / "journal.jsonl").write_text((run / "journal.jsonl").read_text().strip().splitlines()[0] + "\n")
    for later in ("pseudo_labels", *phases[2:]):
        shutil.rmtree(run / later)
    organseg(*words)
    first = [name for name in pseudo_labels(whole) if "round_1" in name]
    assert first and any(pseudo_labels(run)[name] != pseudo_labels(whole)[name] for name in first)


def log(run: Path) -> str:
    return (run / "metrics.csv").read_text() if (run / "metrics.csv").exists() else ""


@pytest.mark.slow
@pytest.mark.alone
def test_two_ranks(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(toy, run, *TWO_RANKS, "--curriculum.rounds=1")
    whole = tmp_path / "whole"
    organseg(*command(toy, whole, *TWO_RANKS, "--curriculum.rounds=1"))
    _, confidence, relabelling, *_ = moments(run)
    for moment in (confidence, relabelling):
        assert stop_when(words, moment, signal.SIGKILL) == -signal.SIGKILL
    organseg(*words)
    assert journal(run) == PHASES[:4]
    assert results(run) == results(whole)
