"""What W&B is left with, read from its own files."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.utilities import rank_zero_only
from offline_runs import config_of, files_of, logged, numbers_of, records

from organseg.cli import run
from organseg.errors import Interrupted, UsageError
from organseg.processes import STOP
from organseg.runtime.metrics_log import MetricsLog
from organseg.runtime.run_folder import RunFolder
from organseg.runtime.tracker import STOPPED, WandbTracker, hyperparameters, reached

wandb = pytest.importorskip("wandb")
CONFIG = Path(__file__).parents[2] / "configs" / "experiment" / "phantom_30_inerrant0.yaml"


@pytest.fixture(autouse=True)
def _own_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B keeps one connection and one environment a process."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_SERVICE", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    wandb.teardown()


class Part:
    """A run's loggers, from its start, or from its going on, to its end."""

    def __init__(self, run: Path, **options: Any) -> None:
        self.run = run
        self.tracker = WandbTracker(**options)
        self.tracker.follow(run, {"seed": 3})
        run.mkdir(exist_ok=True)
        self.metrics = MetricsLog(run / "metrics.csv")

    def log(self, steps: range) -> "Part":
        for step in steps:
            for numbers in ({"train/loss": 1 / (step + 1)}, {"val/dsc": step / 7} if step % 5 == 4 else {}):
                if numbers:
                    self.metrics.log_metrics(numbers, step)
                    self.tracker.log_metrics({**numbers, "epoch": 0}, step)
        return self

    def end(self) -> None:
        self.tracker.finish(self.run / "last.ckpt")
        wandb.teardown()  # as the end of a process: waits until all is written


# Each number once.


def test_every_number_of_the_csv_is_there_once(tmp_path):
    Part(tmp_path / "run").log(range(12)).end()
    assert logged(tmp_path / "run") == numbers_of(tmp_path / "run")
    assert len(logged(tmp_path / "run")) == 14
    assert config_of(tmp_path / "run") == {"seed": 3}


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("first", [6, *(pytest.param(step, marks=pytest.mark.faults) for step in (0, 12))])
def test_a_run_that_lost_the_end_of_its_file_fills_the_gap_and_repeats_nothing(tmp_path, kept, first):
    run = tmp_path / "run"
    Part(run).log(range(12)).end()
    (file,) = files_of(run)
    file.write_bytes(file.read_bytes()[: 7 + int(kept * (file.stat().st_size - 7))])
    before = logged(run)
    Part(run).log(range(first, 20)).end()
    assert logged(run) == numbers_of(run) and len(numbers_of(run)) == 24
    assert len(files_of(run)) == 2 and len({path.name for path in files_of(run)}) == 1, "one id"
    assert before == [row for row in logged(run) if row in before]


def test_a_run_killed_after_its_last_step_is_filled_when_it_ends(tmp_path):
    run = tmp_path / "run"
    Part(run).log(range(7)).end()
    files_of(run)[0].write_bytes(files_of(run)[0].read_bytes()[:2000])
    assert 0 < len(logged(run)) < 8
    Part(run).end()
    assert logged(run) == numbers_of(run)


def test_a_tracker_that_comes_later_gets_what_was_before_it(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    metrics = MetricsLog(run / "metrics.csv")
    for step in range(5):
        metrics.log_metrics({"train/loss": float(step)}, step)
    Part(run).log(range(5, 8)).end()
    assert logged(run) == numbers_of(run) and len(logged(run)) == 8


def test_records_longer_than_a_block_are_read_back(tmp_path):
    run = tmp_path / "run"
    names = [f"metric/{'x' * 40}/{number}" for number in range(900)]
    part = Part(run)
    for step in range(3):
        part.tracker.log_metrics(dict.fromkeys(names, float(step)), step)
    part.end()
    (file,) = files_of(run)
    assert max(record.ByteSize() for record in records(file)) > 1 << 15
    assert reached(run / "wandb", (run / "wandb_id").read_text().strip()) == {
        **dict.fromkeys(names, 2), "_step": 2, "_timestamp": 2, "_runtime": 2
    }  # fmt: skip


def test_one_flipped_byte_ends_what_is_believed(tmp_path):
    run = tmp_path / "run"
    Part(run).log(range(12)).end()
    (file,) = files_of(run)
    content = bytearray(file.read_bytes())
    identifier = (run / "wandb_id").read_text().strip()
    whole = reached(run / "wandb", identifier)["train/loss"]
    content[content.index(b"0.2", 1000)] ^= 1
    file.write_bytes(content)
    assert reached(run / "wandb", identifier).get("train/loss", -1) < whole == 11


# Ids.


def test_the_id_is_kept_and_a_sweeps_is_taken(tmp_path, monkeypatch):
    for name in ("a", "b"):
        Part(tmp_path / name).log(range(1)).end()
    ids = [(tmp_path / name / "wandb_id").read_text().strip() for name in ("a", "b")]
    assert len({*ids}) == 2
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    wandb.teardown()
    Part(tmp_path / "c").log(range(1)).end()
    assert (tmp_path / "c" / "wandb_id").read_text() == "fromagent\n"
    (begun,) = [record.run for record in records(files_of(tmp_path / "c")[0]) if record.HasField("run")]
    assert (begun.run_id, begun.sweep_id, begun.resume) == ("fromagent", "sweep1", True)


def test_a_run_begun_anew_is_another_one(tmp_path):
    run = tmp_path / "run"
    Part(run).log(range(1)).end()
    (run / STOPPED).touch()
    RunFolder(run).clear()
    assert list(run.iterdir()) == []


def test_a_failure_ends_the_run_with_the_commands_exit_code(tmp_path):
    part = Part(tmp_path / "run").log(range(3))
    part.tracker.finalize("success")  # a phase of several
    part.log(range(3, 6))
    try:
        raise Interrupted("stopped by a signal")
    except Interrupted:
        part.tracker.finalize("failed")
    wandb.teardown()
    (code,) = [record.exit.exit_code for record in records(files_of(tmp_path / "run")[0]) if record.HasField("exit")]
    assert code == 75 and logged(tmp_path / "run") == [row for row in numbers_of(tmp_path / "run") if row[0] < 5]
    Part(tmp_path / "run").log(range(5, 7)).end()
    assert logged(tmp_path / "run") == numbers_of(tmp_path / "run")


class Server:
    """A run of W&B's server, which takes no number of a step that it has."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.id, self.settings = "a", wandb.Settings(mode="online")

    @property
    def starting_step(self) -> int:
        return max(self.rows, default=-1) + 1

    def log(self, values: dict[str, float], step: int) -> None:
        assert step >= self.began, "the server ignores what comes late"
        self.rows.setdefault(step, {}).update(values)

    def finish(self, exit_code: int) -> None:
        """Nothing is left to be sent."""


def test_a_validation_that_was_interrupted_reaches_the_server_with_its_step(tmp_path, monkeypatch):
    server = Server()

    def start(*_: Any) -> Server:
        server.began = server.starting_step
        return server

    monkeypatch.setattr(WandbTracker, "_start", start)
    part = Part(tmp_path / "run").log(range(4))
    part.metrics.log_metrics({"train/loss": 0.2}, 4)
    part.tracker.log_metrics({"train/loss": 0.2}, 4)  # then it validates, and is asked to stop
    part.tracker.finalize("failed")
    assert server.starting_step == 4
    Part(tmp_path / "run").log(range(4, 7)).end()
    assert server.rows == {
        step: {"train/loss": 1 / (step + 1), **({"val/dsc": 4 / 7} if step == 4 else {})} for step in range(7)
    }


# Nothing is said that was not asked for.


def test_only_hyperparameters_are_sent_by_the_names_of_their_options():
    identity = {
        "seed": 3, "model.class_path": "organseg.methods.PriorModule", "model.init_args.coarse": "runs/a/last.ckpt",
        "model.init_args.optimizer.init_args.lr": 0.1, "model.init_args.network.width": 16, "trainer.max_steps": 5,
        "trainer.max_time": None, "trainer.model_registry": "x", "data.class_path": "organseg.data.SliceDataModule",
        "data.label_share": 0.3, "data.organs": ["liver", "spleen"], "data.cache": "cache", "data.seed": 3,
        "data.augmentation.scale": [0.8, 1.2], "data content": "0a1b", "curriculum.rounds": 2, "out": "runs/a",
        "model.init_args.prior": "/home/me/prior", "model.init_args.note": "two words", "curriculum.x": {"a": "b"},
    }  # fmt: skip
    assert hyperparameters(identity) == {
        "seed": 3, "model.class_path": "organseg.methods.PriorModule", "model.init_args.optimizer.init_args.lr": 0.1,
        "model.init_args.network.width": 16, "trainer.max_steps": 5, "data.class_path": "organseg.data.SliceDataModule",
        "data.init_args.label_share": 0.3, "data.init_args.organs": ["liver", "spleen"],
        "data.init_args.augmentation.scale": [0.8, 1.2], "curriculum.rounds": 2,
    }  # fmt: skip


def test_what_a_module_would_send_is_not_sent(tmp_path):
    part = Part(tmp_path / "run")
    part.tracker.log_hyperparams({"cache": "/home/me"})
    assert not (tmp_path / "run" / "wandb").exists()
    part.log(range(1)).end()
    assert config_of(tmp_path / "run") == {"seed": 3}


SCRIPT = """
import sys
from pathlib import Path
from organseg.runtime.tracker import WandbTracker
import wandb
for keep in (False, True):
    run = Path(sys.argv[1]) / str(keep)
    run.mkdir()
    tracker = WandbTracker(keep_identity=keep)
    tracker.follow(run, {"seed": 3})
    tracker.log_metrics({"loss": 1.0}, 0)
    print("a line of the output")
    tracker.finish(run / "last.ckpt")
    wandb.teardown()
"""


def test_names_stay_here_unless_asked_for(tmp_path):
    folder = tmp_path / "canary_folder"
    folder.mkdir()
    environment = {**os.environ, "CANARY": "canary_secret", "USER": "canary_user", "LOGNAME": "canary_user",
                   "WANDB_API_KEY": "c0ffee" * 8}  # fmt: skip
    named = ["unshare", "--uts", "sh", "-c", 'hostname canary-host; exec "$@"', "sh"]
    able = subprocess.run([*named, "true"], capture_output=True).returncode == 0
    words = [*(named if able else []), sys.executable, "-c", SCRIPT, str(folder)]
    subprocess.run(words, check=True, env=environment, timeout=120, cwd=Path(__file__).parents[2])
    host = "canary-host" if able else socket.gethostname()
    canaries = [host, str(folder), str(Path.home()), "canary_secret", "canary_user", "c0ffee", sys.executable]
    found = {}
    for keep in (False, True):
        assert logged(folder / str(keep)) == [(0, "loss", 1.0)]
        text = everything_below(folder / str(keep) / "wandb")
        found[keep] = {canary for canary in [*canaries, "requirements.txt", "a line of the output"] if canary in text}
    assert found[False] == set()
    assert {host, sys.executable, "requirements.txt"} <= found[True], "or this test would see nothing"
    assert not {"canary_secret", "c0ffee"} & found[True]


def everything_below(folder: Path) -> str:
    """Names, targets of links, bytes of files, and the records of W&B's."""
    text = []
    for path in folder.rglob("*"):
        text.append(str(path.relative_to(folder)))
        if path.is_symlink():
            text.append(str(path.readlink()))
        elif path.is_file():
            text.append(path.read_bytes().decode("latin-1"))
        if path.suffix == ".wandb":
            text += map(str, records(path))
    return "\n".join(text)


def test_cases_and_checkpoints_are_sent_when_asked(tmp_path):
    run = tmp_path / "run"
    part = Part(run, checkpoints=True).log(range(5))
    (run / "last.ckpt").write_bytes(b"weights")
    picture = np.zeros((4, 6, 3), dtype=np.uint8)
    part.tracker.log_cases(["case", "liver"], [["a/1", 0.5], ["a/2", float("nan")]], {"a/1": picture}, 4)
    part.end()
    media = {path.suffix for path in run.glob("wandb/*/files/media/**/*.*")}
    assert media == {".json", ".png"}
    artifacts = [record.artifact for record in records(files_of(run)[0]) if record.HasField("artifact")]
    model = next(artifact for artifact in artifacts if artifact.type == "model")
    assert [(entry.path, entry.size) for entry in model.manifest.contents] == [("last.ckpt", 7)]
    places = [Path(entry.local_path) for artifact in artifacts for entry in artifact.manifest.contents]
    assert all(place.is_file() and run in place.parents for place in places), "`wandb sync` finds them in the run"
    again = Part(run, checkpoints=True)
    again.tracker.log_cases(["case", "liver"], [["a/1", 0.5]], {"a/1": picture}, 4)
    again.end()
    assert len(list(run.glob("wandb/*/files/media/**/*.png"))) == 1


# W&B fails.


def test_without_w_and_b_the_remedy_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UsageError, match=r"not installed; pip install 'organseg\[wandb\]'$"):
        WandbTracker().follow(tmp_path, {})


def test_online_without_a_key_is_recorded_offline_and_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")  # wins over the option
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    Part(tmp_path / "run").log(range(3)).end()
    assert logged(tmp_path / "run") == numbers_of(tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("organseg: warning: W&B") == 1 and "WANDB_API_KEY" in said and "wandb sync" in said


def test_a_place_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").touch()
    Part(tmp_path / "run").log(range(6)).end()
    assert capsys.readouterr().err.count("organseg: warning: W&B: NotADirectoryError") == 1
    assert len(numbers_of(tmp_path / "run")) == 7


def test_a_recorder_that_dies_is_said_once_and_the_next_start_fills_the_gap(tmp_path, capsys):
    run = tmp_path / "run"
    part = Part(run).log(range(3))
    (core,) = [pid for pid, words in processes() if b"wandb-core" in words[0] and str(os.getpid()).encode() in words]
    os.kill(core, 9)
    part.log(range(3, 9))
    part.end()
    assert capsys.readouterr().err.count("organseg: warning: W&B") == 1
    assert len(logged(run)) < len(numbers_of(run)) == 10
    Part(run).log(range(7, 12)).end()
    assert logged(run) == numbers_of(run)


def processes() -> Iterator[tuple[int, list[bytes]]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield int(path.parent.name), path.read_bytes().split(b"\0")
        except OSError:
            continue


def test_another_rank_logs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    tracker = Part(tmp_path / "run").tracker
    tracker.log_metrics({"train/loss": 1.0}, 0)
    tracker.log_cases(["case"], [["a/1"]], {}, 0)
    tracker.finish(tmp_path / "run" / "last.ckpt")
    assert list((tmp_path / "run").iterdir()) == []


def test_disabled_means_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Part(tmp_path / "run").log(range(2)).end()
    assert not (tmp_path / "run" / "wandb").exists() and not (tmp_path / "run" / "wandb_id").exists()


def test_who_is_not_told_of_a_run_logs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = WandbTracker()  # as in `organseg test`
    tracker.log_metrics({"test/dsc": 0.5}, 0)
    tracker.finalize("success")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("under_agent", [False, True])
def test_w_and_b_ends_a_run_for_good(tmp_path, monkeypatch, capsys, under_agent):
    if under_agent:
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "x")
    monkeypatch.setattr(STOP, "asked", False)
    tracker = Part(tmp_path / "run").tracker
    tracker._stop()
    assert (tmp_path / "run" / STOPPED).exists()
    assert STOP.asked != under_agent, "an agent's SIGTERM would be the second request"
    (tmp_path / "run" / "run.json").write_text('{"finished": false, "identity": {}}')
    words = ["fit", "--config", str(CONFIG), "--out", str(tmp_path / "run"), "--data.init_args.cache", str(tmp_path)]
    assert run(words) == 2 and "W&B ended this run early; --overwrite starts anew" in capsys.readouterr().err


def test_the_settings_that_keep_names_here_exist_in_this_w_and_b():
    from organseg.runtime.tracker import _ANONYMOUS

    settings = wandb.Settings(**_ANONYMOUS)
    assert {name: getattr(settings, name) for name in _ANONYMOUS} == _ANONYMOUS
