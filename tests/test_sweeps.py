"""`configs/sweep/` against the real parser and W&B's own agent, and what `tools/sweep.py` does without a training."""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from organseg.cli.modules import build_module
from organseg.cli.training import run_lightning
from organseg.curriculum import Curriculum
from organseg.errors import UsageError

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "sweep.py"
SWEEPS = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
assert len(SWEEPS) >= 3

sys.path.insert(0, str(TOOL.parent))  # as for a script
import sweep_values  # noqa: E402

spec = importlib.util.spec_from_file_location("sweep", TOOL)
assert spec is not None and spec.loader is not None
sweep_tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep_tool)


def loaded(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = sweep_tool.load(path)
    return found


def corners(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The lower and the upper end of every range, and enough points that each listed value comes up."""
    parameters = sweep["parameters"].items()
    lists = {name: item.get("values", [item.get("min"), item.get("max")]) for name, item in parameters}
    longest = max(map(len, lists.values()))
    turns = [{name: values[turn % len(values)] for name, values in lists.items()} for turn in range(longest)]
    return [*turns, {name: values[-1] for name, values in lists.items()}]


def parsed(words: list[str]) -> dict[str, Any]:
    """The config that the real command makes of its words."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as ended:
        run_lightning(["fit", *words, "--print_config"])
    assert ended.value.code == 0
    config: dict[str, Any] = yaml.safe_load(text.getvalue())
    return config


def words_of(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """What `trial` gets."""
    command: list[str] = sweep_tool.command_of(sweep, values)
    assert command[:4] == ["/usr/bin/env", "python", "tools/sweep.py", "trial"]
    return command[4:]


# The files.

DOCUMENTED = {"program", "entity", "project", "description", "name", "method", "metric", "parameters",
              "early_terminate", "command", "run_cap"}  # fmt: skip
FORMS = ({"values"}, {"value"}, {"min", "max"}, {"min", "max", "distribution"}, {"values", "probabilities"})


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_file_has_what_w_and_b_documents_and_never_looks_at_test_cases(path):
    sweep = loaded(path)
    assert {*sweep} <= DOCUMENTED
    assert sweep["method"] in ("bayes", "random", "grid")
    assert sweep["metric"] == {"name": "val/dsc", "goal": "maximize"}
    assert all({*item} in FORMS for item in sweep["parameters"].values())
    if sweep["method"] == "grid":
        assert all("values" in item for item in sweep["parameters"].values())
    else:
        assert sweep["early_terminate"]["type"] == "hyperband"
    words = words_of(sweep, {})
    assert "--trainer.logger.init_args.offline=false" in words  # an agent needs the server, and has it
    config = parsed(words)
    assert config["data"]["init_args"]["val_share"] > 0 and config["trainer"]["val_check_interval"] > 0
    assert config["trainer"]["logger"]["class_path"] == "organseg.runtime.tracker.WandbTracker"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_is_one_that_the_real_parser_and_the_method_take(path):
    sweep = loaded(path)
    drawn = itertools.islice(sweep_values.points({**sweep, "method": "bayes"}, seed=1), 3)
    for values in [*corners(sweep), *drawn]:
        config = parsed(words_of(sweep, values))
        for name, value in values.items():
            found: Any = config
            for part in name.split("."):
                found = found[part]
            assert found == value and type(found) is type(value), name
        network = build_module(config["model"], ["liver", "spleen"]).network
        assert sum(parameter.numel() for parameter in network.parameters()) > 0
        if config["curriculum"]:
            parser = ArgumentParser(exit_on_error=False)
            parser.add_argument("--curriculum", type=Curriculum)
            whole = parser.instantiate(parser.parse_object({"curriculum": config["curriculum"]}))
            assert whole.curriculum.rounds == values["curriculum.rounds"]


def test_the_parser_would_refuse_another_name():
    sweep = loaded(SWEEPS[0])
    with pytest.raises(UsageError, match="gamma_maxx"):
        run_lightning(["fit", *words_of(sweep, {"curriculum.gamma_maxx": 0.5}), "--print_config"])


# The command line, as W&B's own agent makes it.


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_command_is_the_one_that_w_and_bs_agent_runs(path, tmp_path, monkeypatch):
    agents = pytest.importorskip("wandb.wandb_agent")
    noted = tmp_path / "noted.json"
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys\n"
        f"json.dump([sys.argv, {{**os.environ}}], open({str(noted) + '.part'!r}, 'w'))\n"
        f"os.rename({str(noted) + '.part'!r}, {str(noted)!r})"
    )
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, str(tmp_path))  # the agent sets them; put back afterwards
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.chdir(tmp_path)
    sweep = {**loaded(path), "program": str(program)}
    (values,) = itertools.islice(sweep_values.points(sweep, seed=3), 1)
    agent = agents.Agent(api=None, queue=None, sweep_id="s1")
    agent._sweep_command = list(sweep["command"])
    given = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": "r1", "program": str(program), "args": given})
    agent._run_processes["r1"].wait(timeout=30)
    words, environment = json.loads(noted.read_text())
    assert words == sweep_tool.command_of(sweep, values)[2:]
    assert (environment["WANDB_RUN_ID"], environment["WANDB_SWEEP_ID"]) == ("r1", "s1")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", environment["WANDB_SWEEP_PARAM_PATH"])
    assert sweep_tool.drawn() == values


def test_variables_of_the_environment_are_macros(monkeypatch):
    monkeypatch.setenv("PLACE", "here")
    sweep = {"command": ["a", "--x=${envvar:PLACE}/${envvar:GONE}", "${unknown}", 3], "program": "p"}
    assert sweep_tool.command_of(sweep, {}) == ["a", "--x=here/GONE", "${unknown}", "3"]


# Values.


def test_a_grid_is_walked_in_the_order_of_its_file():
    sweep = {"method": "grid", "parameters": {"a": {"values": [2, 1]}, "b": {"value": 5}, "c": {"min": 0, "max": 2}}}
    assert list(sweep_values.points(sweep, 0)) == [{"a": a, "b": 5, "c": c} for a in (2, 1) for c in (0, 1, 2)]
    assert len(list(sweep_values.points(loaded(ROOT / "configs/sweep/utransformer_grid.yaml"), 0))) == 24


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"min": 1, "max": 3}, lambda v: v in (1, 2, 3) and isinstance(v, int)),
        ({"min": 1, "max": 3.0}, lambda v: 1 <= v <= 3 and isinstance(v, float)),
        ({"distribution": "log_uniform_values", "min": 0.001, "max": 0.1}, lambda v: 0.001 <= v <= 0.1),
        ({"distribution": "q_uniform", "min": 0, "max": 10, "q": 2.5}, lambda v: v in (0, 2.5, 5, 7.5, 10)),
        ({"values": ["x", "y"], "probabilities": [0, 1]}, lambda v: v == "y"),
    ],
)
def test_drawn_values_lie_in_their_range(item, expected):
    values = [sweep_values.draw("p", item, random.Random(number)) for number in range(200)]
    assert all(map(expected, values))


def test_a_log_uniform_range_is_drawn_uniformly_in_the_logarithm():
    item = {"distribution": "log_uniform_values", "min": 0.0001, "max": 1.0}
    values = [sweep_values.draw("p", item, random.Random(number)) for number in range(2000)]
    assert abs(sum(value < 0.01 for value in values) / 2000 - 0.5) < 0.05


def test_the_same_seed_draws_the_same_and_another_seed_something_else():
    sweep = loaded(ROOT / "configs/sweep/inerrant_bayes.yaml")
    first, again, other = ([*itertools.islice(sweep_values.points(sweep, seed), 3)] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "item", [{"distribution": "beta", "a": 1}, {"parameters": {"x": {"value": 1}}}, {"min": 0.5}, {}]
)
def test_what_cannot_be_drawn_is_refused_by_name(item):
    with pytest.raises(UsageError, match=r"parameters\.p: found"):
        sweep_values.draw("p", item, random.Random(0))
    with pytest.raises(UsageError, match=r"parameters\.p: found .* expected `values`"):
        list(sweep_values.points({"method": "grid", "parameters": {"p": item}}, 0))


# Requests to stop, on their way through an agent.

AGENT = """
import subprocess, sys
sys.exit(0 * subprocess.Popen(sys.argv[1:], process_group=0).wait())
"""
"""As W&B's agent does: a trial in a process group of its own; whatever it does, the agent ends well."""

TRIAL = """
import os, pathlib, signal, sys, time
heard = pathlib.Path(sys.argv[2])
def note(number, frame):
    with heard.open("a") as file:
        file.write(f"{number} ")
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, note)
heard.touch()
while not heard.read_text():
    time.sleep(0.05)
time.sleep(1.5)
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("everyone", [False, True], ids=["one process", "all processes, as SLURM does"])
def test_a_request_to_stop_reaches_a_trial_once_and_becomes_75(tmp_path, number, everyone):
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "stub.py").write_text(TRIAL)
    heard = tmp_path / "heard"
    stub = [sys.executable, str(tmp_path / "stub.py"), "trial", str(heard)]
    agent = [sys.executable, str(tmp_path / "agent.py"), *stub]
    command = [sys.executable, str(TOOL), "resume", str(tmp_path / "trials"), "--", *agent]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        wait_for(heard.exists)
        for pid in in_session(process.pid) if everyone else [process.pid]:
            os.kill(pid, number)
        assert process.wait(timeout=30) == 75
        assert in_session(process.pid) == [], "it waits for the trial, whose checkpoint may take a while"
        assert heard.read_text().split() == [str(int(number))]
    finally:
        for pid in in_session(process.pid):
            os.kill(pid, signal.SIGKILL)


def in_session(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its, *_ = stat.read_text().rpartition(")")[2].split()
            if int(its) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_resume_runs_the_command_and_has_its_exit_code(tmp_path):
    for code in (0, 3):
        words = [sys.executable, TOOL, "resume", tmp_path, "--", sys.executable, "-c", f"raise SystemExit({code})"]
        assert subprocess.run(words, timeout=30).returncode == code


def test_resume_says_so_if_a_trial_failed(tmp_path, monkeypatch):
    """An agent ends with 0 whatever its trials did."""
    codes = iter([4, 0, 0, 0])
    monkeypatch.setattr(sweep_tool, "supervise", lambda *_, **__: (next(codes), False))
    trial_of(tmp_path, "a", {"lr": 1})
    assert sweep_tool.resume(tmp_path, ["wandb", "agent"]) == 4


def test_a_trial_holds_its_run_folder_before_it_becomes_a_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "execv", lambda *_: None)
    for name, value in (("WANDB_RUN_ID", "a"), ("SWEEP_FOLDER", str(tmp_path))):
        monkeypatch.setenv(name, value)
    words = [sys.executable, str(TOOL), "trial", "--config", "x"]
    sweep_tool.trial(words[3:])
    assert subprocess.run(words, timeout=30, capture_output=True).returncode == 75
    assert subprocess.run([sys.executable, "-c", f"""
import sys; sys.path.insert(0, {str(TOOL.parent)!r})
import pathlib, sweep
sys.exit(sweep.is_running(pathlib.Path({str(tmp_path / 'a')!r})))
"""], timeout=30).returncode == 1  # fmt: skip


# States and the table.


def trial_of(folder: Path, name: str, parameters: dict[str, Any], metrics: str = "", **more: Any) -> Path:
    """What a trial leaves behind."""
    run = folder / name
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("step,metric,value\n" + metrics)
    note = {"parameters": parameters, "environment": {}, "words": [], **more}
    (folder / f"{name}.json").write_text(json.dumps(note))
    return run


def test_the_table_shows_what_varied_the_best_first(tmp_path, capsys):
    good = "9,train/loss,0.5\n9,val/dsc,0.5\n19,val/dsc,0.75\n29,val/dsc,0.625\n"
    done = trial_of(tmp_path, "b", {"lr": 0.00123456, "same": 1}, good)
    (done / "run.json").write_text('{"finished": true}')
    trial_of(tmp_path, "a", {"lr": 0.1, "same": 1}, "4,val/dsc,0.25\n4,val/ds")  # torn by a kill
    trial_of(tmp_path, "c", {"lr": 1.0, "same": 1}, **{"exit code": 7})
    (trial_of(tmp_path, "d", {"lr": 2.0, "same": 1}, "0,train/loss,1.0\n") / "wandb_stopped").touch()
    assert sweep_tool.main(["table", str(tmp_path)]) == 0
    expected = [
        "trial,lr,best val/dsc %,after steps,last val/dsc %,steps,state",
        "b,0.001235,75.0,20,62.5,30,finished",
        "a,0.1,25.0,5,25.0,5,interrupted",
        "c,1,,,,0,failed (7)",
        "d,2,,,,1,stopped",
    ]
    assert (tmp_path / "table.csv").read_text().splitlines() == expected
    markdown = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == markdown
    assert markdown.splitlines()[2] == "| b | 0.001235 | 75.0 | 20 | 62.5 | 30 | finished |"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"parameters": {}}', "null", "\xff"])
def test_a_file_that_is_no_trials_note_is_named(tmp_path, content):
    trial_of(tmp_path, "a", {"lr": 1})
    (tmp_path / "b.json").write_text(content, encoding="latin-1")
    for words in (["table", str(tmp_path)], ["resume", str(tmp_path)]):
        with pytest.raises(UsageError, match=r"b\.json: found no note of a trial"):
            sweep_tool.main(words)


def test_a_trial_that_another_process_trains_is_running(tmp_path):
    run = trial_of(tmp_path, "a", {"lr": 1})
    (run / ".lock").touch()
    assert sweep_tool.state(run, {}) == "interrupted"
    hold = f"import fcntl, time; f = open({str(run / '.lock')!r}, 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=1); time.sleep(60)"  # fmt: skip # noqa: E501
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        assert sweep_tool.state(run, {}) == "running"
        assert sweep_tool.main(["resume", str(tmp_path)]) == 0  # and is left alone
    finally:
        process.kill()
        process.wait()


def test_the_tool_and_the_tracker_mean_the_same_file(tmp_path):
    from organseg.runtime.tracker import STOPPED

    (trial_of(tmp_path, "a", {}) / STOPPED).touch()
    assert sweep_tool.state(tmp_path / "a", {}) == "stopped"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table", "{}"], "found no trial"),
        (["local", "{}/gone.yaml", "--out", "{}/x"], "no such file"),
        (["local", "{}/empty.yaml", "--out", "{}/x"], "found no metric, parameters, command"),
        (["trial", "--config", "x"], "found no WANDB_RUN_ID"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(tmp_path, words, message):
    (tmp_path / "empty.yaml").write_text("method: grid")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run([sys.executable, TOOL, *(word.format(tmp_path) for word in words)], capture_output=True,
                          text=True, env=environment, timeout=60)  # fmt: skip
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_key_in_a_trials_words_is_refused_before_it_is_noted(tmp_path):
    environment = {**os.environ, "WANDB_RUN_ID": "r1", "SWEEP_FOLDER": str(tmp_path)}
    words = [sys.executable, TOOL, "trial", "--trainer.logger.init_args.api_key=0123456789abcdef"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "looks like a key" in done.stderr
    assert not list(tmp_path.iterdir())
