"""`tools/trained.py`: several trainings at a time, each after what it needs, and none after a failure."""

import sys
import threading
from pathlib import Path

import pytest
import warm

from organseg.errors import UsageError

sys.path.append(str(warm.TOOLS))

import trained
from trained import Training


class Commands:
    """What `organseg` is called with; what is called `together` waits until as many as there are jobs run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, jobs: int, failing: str = "") -> None:
        self.words: list[tuple[str, ...]] = []
        self.together = threading.Barrier(jobs, timeout=20)
        self.failing = failing
        monkeypatch.setattr(trained, "organseg", self)

    def __call__(self, *words: str) -> None:
        self.words.append(words)
        if words[0] == "fit" and words[1].startswith("together"):
            self.together.wait()
        if words[1] == self.failing:
            raise trained.CommandError(words, 2)


def fits(commands: Commands) -> list[str]:
    return [words[1] for words in commands.words if words[0] == "fit"]


def test_as_many_as_there_are_jobs_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(monkeypatch, 3)
    checks: list[int] = []
    missing = [Training(Path(name), [name]) for name in ("together a", "together b", "together c", "d")]
    trained.train(missing, 1, 3, lambda: checks.append(1))
    assert sorted(fits(commands)) == ["d", "together a", "together b", "together c"]
    assert len(commands.words) == len(checks) == 8  # a test and two checks each


def test_what_needs_another_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(monkeypatch, 1)
    missing = [Training(Path("round0"), ["round0"]), Training(Path("inerrant"), ["inerrant"], Path("round0"))]
    trained.train(missing, 1, 2, lambda: None)
    tested = next(i for i, words in enumerate(commands.words) if words[0] == "test" and "round0" in words[2])
    assert tested < commands.words.index(("fit", "inerrant"))
    finished = [Training(Path("smile"), ["smile"], Path("of an earlier call"))]
    trained.train(finished, 1, 2, lambda: None)
    assert fits(commands)[-1] == "smile"


@pytest.mark.parametrize("jobs", [1, 2])
def test_after_a_failure_no_other_is_begun(monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    commands = Commands(monkeypatch, 1, failing="round0")
    missing = [Training(Path("round0"), ["round0"])]
    missing += [Training(Path(name), [name], Path("round0")) for name in ("a", "b", "c")]
    with pytest.raises(trained.CommandError):
        trained.train(missing, 1, jobs, lambda: None)
    assert fits(commands) == ["round0"]


def test_none_is_begun_when_time_is_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commands = Commands(monkeypatch, 1)
    trained.train([Training(Path("runs/a"), ["a"])], 0, 1, lambda: None)
    assert not commands.words and "no time left to begin runs/a" in capsys.readouterr().out


def test_no_job_at_a_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(monkeypatch, 1)
    with pytest.raises(UsageError, match="--jobs 0: expected at least 1"):
        trained.train([Training(Path("runs/a"), ["a"])], 1, 0, lambda: None)
    assert not commands.words


def test_a_command_that_fails_is_an_error_with_its_exit_code() -> None:
    with pytest.raises(trained.CommandError, match="organseg fit --config none") as failed:
        trained.organseg("fit", "--config", "none.yaml")
    assert failed.value.exit_code == 2
    assert trained.CommandError(("fit",), -9).exit_code == 137
