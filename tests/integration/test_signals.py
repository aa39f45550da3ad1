"""Signals to the processes of a two-rank `fit`: exit codes, checkpoints and the process table (FAULTS.md 1 and 6)."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rounds import TWO_RANKS, command, losses, results
from toy import organseg

from organseg.checkpoints import verify_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.alone]

MORE = ("--curriculum.rounds=1", "--data.init_args.val_share=0.3", "--data.init_args.label_share=0.6",
        "--trainer.val_check_interval=20", "--rank_timeout_s=20", *TWO_RANKS)  # fmt: skip
GROUP = -1


class Fit:
    """A running `fit` of two ranks."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.run = words[words.index("--out") + 1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "organseg", *words], env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def all(self) -> list[int]:
        """Process ids of whatever has the run's folder among its words: ranks and their loader workers."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
                zombie = re.search(r"^State:\s+Z", (place / "status").read_text(), flags=re.MULTILINE)
            except OSError:
                continue  # it ended while we looked
            if self.run in words and not zombie:
                found.append(int(place.name))
        return found

    def ranks(self) -> list[int]:
        """Of the ranks that run, 0 first."""
        out = subprocess.run(["ps", "-o", "pid=", "--ppid", f"{self.process.pid}"], capture_output=True, text=True)
        children = [int(pid) for pid in out.stdout.split() if b"LOCAL_RANK=1" in _environment(int(pid))]
        return [self.process.pid, *children[:1]]  # the others are rank 0's loader workers, which came later

    def children(self, rank: int) -> list[int]:
        """Of a rank that has launched no other, the loader workers."""
        words = ["ps", "-o", "pid=", "--ppid", f"{self.ranks()[rank]}"]
        return [int(pid) for pid in subprocess.run(words, capture_output=True, text=True).stdout.split()]

    def listens(self) -> bool:
        """Whether rank 0 takes signals by now; before, they end it as they end any program."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return True
        caught = re.search(r"^SigCgt:\s+(\w+)", status, flags=re.MULTILINE)
        return bool(caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    def send(self, number: int, rank: int) -> None:
        if rank == GROUP:
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.ranks()[min(rank, len(self.ranks()) - 1)], number)

    def end(self, within_s: float) -> int:
        """Its exit code; by then no process of it may be left."""
        try:
            _, self.said = self.process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            left = {pid: Path(f"/proc/{pid}/wchan").read_text() for pid in self.all()}
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            self.said = self.process.communicate()[1]
            pytest.fail(f"still there after {within_s} s: {left}\n{self.said}")
        deadline = time.monotonic() + 2
        while self.all() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not self.all(), "processes were left behind"
        return self.process.returncode


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def wait_for(fit: Fit, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while fit.process.poll() is None and not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def at_step(run: Path, step: int) -> Callable[[], bool]:
    metrics = run / "metrics.csv"
    return lambda: metrics.exists() and f"\n{step},train/loss" in metrics.read_text()


@pytest.mark.parametrize(("number", "rank", "workers"), [
    (signal.SIGTERM, 1, 0),
    pytest.param(signal.SIGUSR1, 0, 0, marks=pytest.mark.faults),
    pytest.param(signal.SIGTERM, GROUP, 2, marks=pytest.mark.faults),
])  # fmt: skip
def test_a_request_to_any_process_leaves_one_checkpoint_and_exit_75(
    number: int, rank: int, workers: int, toy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fit = Fit(command(toy, run, *MORE, "--checkpoint_every_s=1000", f"--data.init_args.workers={workers}"))
    wait_for(fit, at_step(run, 3))
    fit.send(number, rank)
    assert fit.end(within_s=30) == 75, fit.said
    (checkpoint,) = run.rglob("*.ckpt")
    verify_checkpoint(checkpoint)
    assert fit.said.count("stopped by a signal; the same command goes on from step") == 1


def test_a_request_while_validating_is_heard_between_two_cases(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # of `watched`
    slow = ("--trust-import", "watched", "--trainer.callbacks=[{class_path: watched.SlowValidation}]")
    fit = Fit(command(toy, run, *MORE, *slow, "--data.init_args.workers=2"))
    wait_for(fit, at_step(run, 18))
    fit.send(signal.SIGTERM, GROUP)
    assert fit.end(within_s=30) == 75, fit.said
    assert fit.said.count("stopped by a signal while validating; the same command goes on from the last") == 1


def test_a_request_before_the_first_step_is_not_lost(toy: Path, tmp_path: Path) -> None:
    fit = Fit(command(toy, tmp_path / "run", *MORE, "--checkpoint_every_s=1000"))
    wait_for(fit, fit.listens)
    fit.send(signal.SIGUSR1, 0)
    assert fit.end(within_s=60) == 75, fit.said
    assert len(list((tmp_path / "run").rglob("*.ckpt"))) == 1
    assert "goes on from step 1" in fit.said


def test_a_second_request_ends_it_at_once(toy: Path, tmp_path: Path) -> None:
    fit = Fit(command(toy, tmp_path / "run", *MORE))  # which imports for seconds, before it can save
    wait_for(fit, fit.listens)
    fit.send(signal.SIGTERM, 0)
    time.sleep(2.5)
    fit.send(signal.SIGTERM, 0)
    assert fit.end(within_s=5) == -signal.SIGTERM


def test_a_scheduler_that_says_it_twice_in_a_moment_asks_once(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit = Fit(command(toy, run, *MORE, "--trainer.max_steps=1000"))
    wait_for(fit, at_step(run, 3))
    fit.send(signal.SIGTERM, 0)
    time.sleep(0.05)
    fit.send(signal.SIGTERM, 0)
    assert fit.end(within_s=60) == 75, fit.said


@pytest.mark.parametrize(("number", "rank", "code"), [
    (signal.SIGKILL, 1, 6), (signal.SIGKILL, 0, -signal.SIGKILL), (signal.SIGSTOP, 1, 6),
])  # fmt: skip
def test_a_dead_or_stuck_rank_ends_the_others(number: int, rank: int, code: int, toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit = Fit(command(toy, run, *MORE, "--trainer.max_steps=1000"))
    wait_for(fit, at_step(run, 3))
    fit.send(number, rank)
    assert fit.end(within_s=20 + 30) == code, fit.said
    if code == 6:
        assert "organseg: rank 0 lost another rank" in fit.said
        assert ("rank 1 was killed by signal 9" in fit.said) == (number == signal.SIGKILL)
        assert "Traceback" not in fit.said


def test_a_loader_worker_that_is_killed_ends_the_run_and_is_named(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit = Fit(command(toy, run, *MORE, "--trainer.max_steps=1000", "--data.init_args.workers=1"))
    wait_for(fit, at_step(run, 3))
    (worker,) = fit.children(1)
    os.kill(worker, signal.SIGKILL)
    assert fit.end(within_s=20 + 30) == 6, fit.said
    assert re.search(rf"organseg: DataLoader worker \(pid(\(s\))? {worker}\) ", fit.said), fit.said
    assert "organseg doctor" in fit.said and "Traceback" not in fit.said


@pytest.mark.faults
def test_sixty_signals_at_random_moments_and_the_same_weights(toy: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    organseg(*command(toy, whole, *MORE))
    signals = 20 * [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL]
    draw = random.Random(0)
    draw.shuffle(signals)
    seen: dict[tuple[str, int], int] = {}
    for number in signals:
        fit = Fit(command(toy, run, *MORE, f"--data.init_args.workers={draw.choice((0, 2))}"))
        wait_for(fit, fit.listens)
        moment = draw.choice((0.0, 0.0, 1.0, 1.0, 1.0)) * draw.uniform(0, 4)
        if moment:
            wait_for(fit, lambda fit=fit: len(fit.ranks()) == 2)  # type: ignore[misc]
        time.sleep(moment)
        rank = draw.choice((0, 1, GROUP))
        if fit.process.poll() is None:
            fit.send(number, rank)
        print(signal.Signals(number).name, "to", rank, f"after {moment:.2f} s", flush=True)
        code = fit.end(within_s=60)
        killed_0 = number == signal.SIGKILL and (rank != 1 or code == -number)
        expected = {-number} if killed_0 else {6} if number == signal.SIGKILL else {75}
        assert code in {0, *expected}, (number, rank, moment, fit.said)
        seen[signal.Signals(number).name, code] = seen.get((signal.Signals(number).name, code), 0) + 1
        for checkpoint in run.rglob("last.ckpt"):
            verify_checkpoint(checkpoint)
        if code == 0:
            assert results(run) == results(whole)
            run = run.with_name(f"{run.name}+")
    print(seen)
    organseg(*command(toy, run, *MORE))
    assert results(run) == results(whole)
    assert losses(run) == losses(whole)
