"""Sweeps through the real command: trials, what W&B is left with, and what a stop and a kill leave to be done."""

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from offline_runs import config_of, files_of, logged, numbers_of, records
from rounds import TWO_RANKS
from toy import TOY

pytest.importorskip("wandb")
ROOT = Path(__file__).parents[2]
SWEEPS = {path.stem: path for path in (ROOT / "configs" / "sweep").glob("*.yaml")}
WIDTH = "--model.init_args.network.init_args.width=4"
STEPS = ("--trainer.max_steps=2", "--trainer.val_check_interval=1", "--data.init_args.val_share=0.4")
SMALLER = {
    "inerrant_bayes": (*STEPS, "--trainer.max_steps=60", "--trainer.val_check_interval=20",
                       "--curriculum.round_steps=2"),
    "utransformer_grid": (*STEPS, "--model.init_args.network.width=4"),
    "networks_grid": STEPS,
}  # fmt: skip
"""As few steps as there can be; rounds need a network that finds something."""

SECRET = "planted_secret"
KEY = "c0ffee" * 7


def tool(*words: object, **more: str) -> subprocess.Popen[bytes]:
    """`tools/sweep.py` in a session of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CANARY": SECRET, "WANDB_API_KEY": KEY, **more}
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


def small(toy: Path, name: str) -> list[object]:
    """What turns a shipped sweep's trials into ones of seconds."""
    options = [option for option in TOY if name != "utransformer_grid" or option != WIDTH]
    return ["--", f"--data.init_args.cache={toy / 'cache'}", *options, *SMALLER[name]]


def test_every_sweep_is_run_here() -> None:
    assert {*SWEEPS} == {*SMALLER} and WIDTH in TOY


def one_trial(name: str, toy: Path, folder: Path, *more: str) -> Path:
    """Run one drawn command line of a shipped sweep; returns its run folder."""
    words = [SWEEPS[name], "--out", folder, "--count", 1, "--seed", 5, *small(toy, name), *more]
    assert tool("local", *words).wait(300) == 0
    (note,) = folder.glob("*.json")
    values = json.loads(note.read_text())["parameters"]
    identity = json.loads((folder / note.stem / "run.json").read_text())["identity"]
    assert values and {name: identity[name] for name in values} == values
    return folder / note.stem


@pytest.mark.slow
def test_a_drawn_command_line_of_the_curriculums_sweep_trains(toy: Path, tmp_path: Path) -> None:
    run = one_trial("inerrant_bayes", toy, tmp_path)
    assert logged(run) == numbers_of(run) and len(files_of(run)) == 1, "all phases are one run"
    assert any(step > 60 for step, *_ in logged(run)) and any(metric == "val/dsc" for _, metric, _ in logged(run))


@pytest.mark.slow
def test_two_ranks_of_the_utransformers_sweep_write_one_run_with_all_their_cases(toy: Path, tmp_path: Path) -> None:
    run = one_trial("utransformer_grid", toy, tmp_path, "--trainer.logger.init_args.images=true", *TWO_RANKS)
    assert len(files_of(run)) == 1
    assert [row for row in logged(run) if row[1] != "val/cases"] == numbers_of(run)
    files = sorted(run.glob("wandb/*/files/media/**/*.table.json"), key=lambda path: path.stat().st_mtime_ns)
    tables = [json.loads(path.read_text()) for path in files]  # their names end in hashes
    assert len(tables) == 2 and [len(table["data"]) for table in tables] == [2, 2]
    by_organ = list(zip(*(row[1:] for row in tables[-1]["data"]), strict=True))
    known = [[value for value in column if not math.isnan(value)] for column in by_organ]
    means = [sum(column) / len(column) for column in known if column]
    (last,) = [value for step, metric, value in numbers_of(run) if metric == "val/dsc" and step == 1]
    assert sum(means) / len(means) == pytest.approx(last)
    assert len(list(run.glob("wandb/*/files/media/**/*.png"))) >= 1


@pytest.mark.slow
def test_three_offline_runs_and_the_table_that_they_make(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "canary_folder"
    words = [SWEEPS["networks_grid"], "--out", folder, "--count", 3, *small(toy, "networks_grid")]
    words.remove(WIDTH)  # the sweep's own widths
    assert tool("local", *words).wait(300) == 0
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished"] * 3 and {row["steps"] for row in rows} == {"2"}
    network = "model.init_args.network.init_args"
    grid = {(row[f"{network}.norm"], row[f"{network}.width"]) for row in rows}
    assert len(grid) == 3 and grid <= {(norm, width) for norm in ("batch", "instance") for width in ("16", "32")}
    best = [float(row["best val/dsc %"]) for row in rows]
    assert best == sorted(best, reverse=True)
    for row in rows:
        run = folder / row["trial"]
        assert logged(run) == numbers_of(run)
        assert len(files_of(run)) == 1 and files_of(run)[0].name == f"run-{row['trial']}.wandb"
        scores = [value for _, metric, value in logged(run) if metric == "val/dsc"]
        assert row["best val/dsc %"] == f"{100 * max(scores):.1f}" and len(scores) == 2
        config = config_of(run)
        assert config[f"{network}.width"] == int(row[f"{network}.width"])
        assert config["data.init_args.val_share"] == 0.4
        nobodys_names(run, folder, toy)
    assert tool("local", *words).wait(100) == 0, "finished trials are left alone"
    assert len(files_of(folder / rows[0]["trial"])) == 1
    assert tool("local", SWEEPS["utransformer_grid"], *words[1:]).wait(100) == 2, "and never taken for others"


def nobodys_names(run: Path, *places: Path) -> None:
    """No host, user, command line, path or secret in what W&B has written, and no key anywhere in the run."""
    host = [socket.gethostname()] if len(socket.gethostname()) > 4 else []  # short ones come up by chance
    canaries = [*host, *map(str, places), str(ROOT), str(Path.home()), sys.executable, SECRET, KEY, "configs/", "--out"]
    text = [str(record) for path in files_of(run) for record in records(path)]
    for path in run.glob("wandb/**/*"):
        text.append(path.name + (str(path.readlink()) if path.is_symlink() else ""))
        text.append(path.read_bytes().decode("latin-1") if path.is_file() else "")
    assert [canary for canary in canaries for part in text if canary in part] == []
    assert not any(KEY.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_stopped_and_then_killed_trial_goes_on_as_one_run(toy: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    lr = "model.init_args.optimizer.init_args.lr: {distribution: log_uniform_values, min: 0.001, max: 0.01}"
    command = ["${env}", "${interpreter}", "${program}", "trial", "--config",
               "configs/experiment/phantom_30_inerrant0.yaml", "--config", "configs/logger/wandb.yaml",
               f"--data.init_args.cache={toy / 'cache'}", *TOY, *STEPS, "--trainer.max_steps=80",
               "--trainer.val_check_interval=20", "${args}"]  # fmt: skip
    metric = "metric: {name: val/dsc, goal: maximize}\nprogram: tools/sweep.py"
    sweep.write_text(f"method: random\n{metric}\nparameters: {{{lr}}}\ncommand: {json.dumps(command)}\n")
    folder = tmp_path / "trials"

    first = tool("local", sweep, "--out", folder, "--count", 1)
    wait_for(first, lambda: lines_of(folder) > 10)
    os.kill(first.pid, signal.SIGUSR1)
    assert first.wait(60) == 75
    (note,) = folder.glob("*.json")
    run = folder / note.stem
    stopped = lines_of(folder)
    numbers = numbers_of(run)
    assert stopped < 80 and logged(run) == [row for row in numbers if row[0] < numbers[-1][0]], "the next start adds it"

    second = tool("resume", folder)
    wait_for(second, lambda: lines_of(folder) > stopped + 10)
    everyone = [second.pid, *below(second.pid)]  # W&B's own process too
    for pid in everyone:
        os.kill(pid, signal.SIGKILL)
    second.wait()
    while any(map(is_alive, everyone)):
        time.sleep(0.02)  # until then the trial holds its run folder
    assert len(files_of(run)) == 2 and len(logged(run)) < lines_of(folder), "a kill does"

    assert tool("resume", folder).wait(120) == 0
    assert logged(run) == numbers_of(run) and len(numbers_of(run)) > 80
    assert {path.name for path in files_of(run)} == {f"run-{note.stem}.wandb"} and len(files_of(run)) == 3
    assert tool("resume", folder).wait(60) == 0 and len(files_of(run)) == 3, "and that was all"


def lines_of(folder: Path) -> int:
    """Numbers that the one trial of a folder has logged."""
    return sum(len(path.read_text().splitlines()) - 1 for path in folder.glob("*/metrics.csv"))


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def below(root: int) -> list[int]:
    """All that a process has started, and what that has started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    pairs = list(zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True))
    children = [pid for pid, parent in pairs if parent == root]
    return [*children, *(pid for child in children for pid in below(child))]
