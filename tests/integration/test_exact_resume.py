"""A killed run, started again by the same command, ends with the weights of an uninterrupted one (FAULTS.md 5)."""

import hashlib
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from toy import TOY, organseg
from warm import end_of, start

CONFIG = Path(__file__).parents[2] / "configs" / "experiment" / "phantom_30_inerrant0.yaml"
STEPS = 14


def command(toy: Path, run: Path, *more: str) -> list[str]:
    """A run with a checkpoint after every step, and validation in the middle."""
    words = ["fit", "--config", CONFIG, "--data.init_args.cache", toy / "cache", "--out", run, *TOY,
             f"--trainer.max_steps={STEPS}", "--checkpoint_every_s=0", "--data.init_args.val_share=0.3",
             "--trainer.val_check_interval=5", "--data.init_args.label_share=0.6", *more]  # fmt: skip
    return [str(word) for word in words]


def fingerprint(run: Path) -> str:
    """Weights, optimiser and schedule of a run's result."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    digest = hashlib.sha256()
    tensors = [*checkpoint["state_dict"].values()]
    for state in checkpoint["optimizer_states"][0]["state"].values():
        tensors += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    digest.update(repr((checkpoint["global_step"], checkpoint["lr_schedulers"])).encode())
    return digest.hexdigest()


def losses(run: Path) -> list[str]:
    return [line for line in (run / "metrics.csv").read_text().splitlines() if ",pace/" not in line]


@pytest.fixture(scope="module")
def uninterrupted(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    organseg(*command(toy, run), cold=True)  # another interpreter than those that are compared with it
    assert sum(",val/dsc," in line for line in losses(run)) == 2
    return run


def interrupt(words: list[str], run: Path, after_step: int, with_signal: int) -> int:
    """Start the command, signal it once `metrics.csv` shows a step, and return its exit code."""
    process = start(words)
    metrics, wanted = run / "metrics.csv", f"\n{after_step},train/loss"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and wanted in metrics.read_text():
            process.send_signal(with_signal)
            break
        time.sleep(0.01)
    return end_of(process, 60)


@pytest.mark.slow
def test_a_killed_3d_run_ends_equal(toy: Path, tmp_path: Path) -> None:
    config = CONFIG.with_stem("btcv3d_100_inerrant0")
    words = [*command(toy, tmp_path / "run", "--data.init_args.patch_size=[16,16,16]", "--trainer.max_steps=6")]
    words[words.index(str(CONFIG))] = str(config)
    whole = [word.replace(str(tmp_path / "run"), str(tmp_path / "whole")) for word in words]
    organseg(*whole)
    assert interrupt(words, tmp_path / "run", 3, signal.SIGKILL) == -signal.SIGKILL
    organseg(*words)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("step", "workers"), [(6, (2, 0)), (9, (0, 2))])
def test_kill_9_then_the_same_command_ends_equal(
    step: int, workers: tuple[int, int], toy: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first, second = (f"--data.init_args.workers={count}" for count in workers)
    assert interrupt(command(toy, run, first), run, step, signal.SIGKILL) == -signal.SIGKILL
    organseg(*command(toy, run, second))
    assert fingerprint(run) == fingerprint(uninterrupted)
    assert losses(run) == losses(uninterrupted)


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_exits_75_then_ends_equal(
    toy: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = command(toy, run, "--checkpoint_every_s=1000")
    assert interrupt(words, run, 6, signal.SIGTERM) == 75
    organseg(*words)
    assert fingerprint(run) == fingerprint(uninterrupted)
    assert losses(run) == losses(uninterrupted)


@pytest.mark.slow
def test_a_stop_waits_for_the_rest_of_an_accumulated_gradient(toy: Path, tmp_path: Path) -> None:
    runs = tmp_path / "whole", tmp_path / "stopped"
    more = ("--checkpoint_every_s=1000", "--trainer.accumulate_grad_batches=3", "--trainer.max_steps=5")
    whole, stopped = (command(toy, run, *more) for run in runs)
    organseg(*whole)
    assert interrupt(stopped, runs[1], 1, signal.SIGTERM) == 75
    organseg(*stopped)
    assert fingerprint(runs[1]) == fingerprint(runs[0])
    assert losses(runs[1]) == losses(runs[0])


@pytest.mark.slow
def test_an_early_stop_is_not_forgotten(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = "{monitor: train/loss, stopping_threshold: 100.0}"
    early = f"[{{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {options}}}]"
    words = command(toy, run, f"--trainer.callbacks={early}")
    organseg(*words)
    before = fingerprint(run), losses(run)
    assert len([line for line in losses(run) if "train/loss" in line]) == 5, "the first validation ends it"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "finished": False}))  # as if killed just before it was said
    organseg(*words)
    assert (fingerprint(run), losses(run)) == before


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(toy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupt(command(toy, run), run, 7, signal.SIGKILL)
    last = run / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[1000] ^= 4
    last.write_bytes(content)
    done = organseg(*command(toy, run))
    assert "damaged" in done.stderr
    assert "older checkpoint" in done.stderr
    assert fingerprint(run) == fingerprint(uninterrupted)
