"""Sweeps: many runs of one experiment with other options, under W&B's agent or without a server.

    wandb sweep configs/sweep/inerrant_bayes.yaml                          # on the server; prints ENTITY/PROJECT/ID
    python tools/sweep.py resume runs/sweeps/ID -- wandb agent --count 1 ENTITY/PROJECT/ID       # a job's whole work
    python tools/sweep.py local configs/sweep/inerrant_bayes.yaml --out sweeps/a --count 4 --seed 0 [-- fit's options]
    python tools/sweep.py table runs/sweeps/ID

All from the repository's folder. `trial` is what sweep files name as their command: it becomes an ordinary `fit` in
`runs/sweeps/<sweep>/<W&B's id of the run>` (SWEEP_FOLDER names another folder of the trials) and leaves beside it what
it takes to go on, `<id>.json`. `resume` goes on with trials that were cut off, under their ids, then runs the command
behind `--`. `local` is an agent without a server: it takes a grid's points in order, and draws at random for any other
method (Bayesian search and early termination are the server's). W&B records offline: `wandb sync DIR/*/wandb`.

What W&B's agent does with a trial (wandb 0.31, wandb_agent.py), and what is done about it:

- Exit code 75 (interrupted, resumable) counts as a failure like any other. The trial is not offered again; three such
  in the first minute, or five at the start, end the agent, which itself ends with 0 whatever its trials did. So an
  agent gets one trial (`--count 1`), and `resume` says 75 when it was asked to stop, for a requeue.
- SIGTERM and SIGUSR1 end the agent and leave its trial an orphan; `--forward-signals` passes on each one. But SLURM
  signals every process of a step: the trial would get the same request two or three times, and organseg ends at once
  at one that comes two seconds later. So `resume` makes the agent deaf to them, `trial` hears again, and a request is
  passed on to the trial only if it did not reach a bystander as well.
- Early termination is a SIGTERM, which looks like any other: the trial ends with 75. `resume` then goes on with it,
  W&B says again that it shall stop, the run notes that, and nobody resumes it any more. For the same reason runs are
  not marked as preempting: the server would offer again what it has ended itself.

Exit codes: 75 asked to stop; otherwise the command's, or that of the last trial that failed.
"""

import signal
import sys

if sys.argv[1:2] == ["trial"]:  # at once: what started it may be deaf
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)

import argparse
import contextlib
import csv
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from sweep_values import points

from organseg.cli.secret_values import refuse_secrets
from organseg.errors import OrgansegError, UsageError
from organseg.files import publish_text
from organseg.processes import STOP_SIGNALS
from organseg.strict_yaml import read_yaml

INTERRUPTED = 75
REPEATABLE = (1, 2, 3, 4, 7)
"""Exit codes that another attempt would bring again; a full disk or a lost rank may be gone by then."""
KEPT = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_MODE")
"""Of the environment, what a trial needs again: names, no keys."""


# A trial.


def trial(words: Sequence[str]) -> None:
    """Become a `fit` in a folder of its own."""
    identifier, sweep = os.environ.get("WANDB_RUN_ID"), os.environ.get("WANDB_SWEEP_ID")
    place = os.environ.get("SWEEP_FOLDER") or (f"runs/sweeps/{sweep}" if sweep else "")
    if not identifier or not place:
        raise UsageError("trial: found no WANDB_RUN_ID or no WANDB_SWEEP_ID, expected those of an agent; see --help")
    refuse_secrets(words, "trial")
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"{identifier}.json"
    hold(folder / identifier)
    if not note.exists():
        known = {name: os.environ[name] for name in KEPT if name in os.environ}
        publish_text(note, json.dumps({"parameters": drawn(), "environment": known, "words": list(words)}, indent=1))
    os.execv(sys.executable, [sys.executable, "-m", "organseg", "fit", *words, "--out", str(folder / identifier)])


def hold(run: Path) -> None:
    """Take the run folder's lock for what this process becomes; end here if another job has the trial."""
    run.mkdir(exist_ok=True)
    lock = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, True)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"sweep: {run} is another job's by now", file=sys.stderr)
        sys.exit(INTERRUPTED)


def drawn() -> dict[str, Any]:
    """The values that the agent has drawn for this trial."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    given = read_yaml(Path(path)) if path else {}
    return {name: item["value"] for name, item in given.items() if isinstance(item, dict)}


def notes(folder: Path) -> dict[str, dict[str, Any]]:
    """What each trial of a folder has left: id -> note."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            note = json.loads(path.read_text())
            _ = note["parameters"], note["environment"], note["words"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: found no note of a trial ({error!r:.80}), expected one; move it away") from error
        found[path.stem] = note
    return found


def state(run: Path, note: Mapping[str, Any]) -> str:
    """`finished`, `stopped` (by W&B), `failed`, `running`, or `interrupted`: to be resumed."""
    record = run / "run.json"
    if record.exists() and json.loads(record.read_text())["finished"]:
        return "finished"
    if (run / "wandb_stopped").exists():
        return "stopped"
    if is_running(run):
        return "running"
    return f"failed ({note['exit code']})" if "exit code" in note else "interrupted"


def is_running(run: Path) -> bool:
    """Whether a `fit` holds the run folder."""
    try:
        with (run / ".lock").open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


# Several trials, one after the other.


def supervise(command: Sequence[str], more: Mapping[str, str], agent: bool = False) -> tuple[int, bool]:
    """Run a trial, or an agent that starts some; returns the exit code, and whether this process was asked to stop."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in STOP_SIGNALS}
    bystander = subprocess.Popen(["sleep", "100d"], process_group=0)
    deaf = turn_deaf if agent else None
    child = subprocess.Popen(command, env={**os.environ, **more}, process_group=0, preexec_fn=deaf)
    passed_on = 0
    try:
        while child.poll() is None:
            time.sleep(0.1)
            if len(asked) > passed_on:
                time.sleep(0.3)
                for pid in trials_of(child.pid, agent) if bystander.poll() is None else []:
                    os.kill(pid, asked[passed_on])
                passed_on += 1
            elif asked and not trials_of(child.pid, agent):
                child.kill()  # an agent between two trials
    finally:
        bystander.kill()
        bystander.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode, bool(asked)


def turn_deaf() -> None:
    """For an agent, in its process: requests to stop are for its trial."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def trials_of(root: int, agent: bool) -> list[int]:
    """Processes that are a trial, of a process (unless an agent) and what it started; without a trial's own ranks."""
    children: dict[int, list[int]] = {}
    words: dict[int, list[bytes]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent, pid = int(stat.read_text().rpartition(")")[2].split()[1]), int(stat.parent.name)
            words[pid] = (stat.parent / "cmdline").read_bytes().split(b"\0")
            children.setdefault(parent, []).append(pid)
    if not words:
        return [root]  # no Linux: nothing is known of what an agent starts
    found, open_ones = [], children.get(root, []) if agent else [root]
    while open_ones:
        pid = open_ones.pop()
        if b"trial" in words.get(pid, []) or {b"organseg", b"fit"} <= {*words.get(pid, [])}:
            found.append(pid)
        else:
            open_ones += children.get(pid, [])
    return found


def finish(folder: Path) -> tuple[int, bool]:
    """Go on with the trials that were cut off; returns the last failure's exit code, and whether to stop."""
    failure = 0
    for identifier, note in notes(folder).items():
        print(f"sweep: {identifier} is {(now := state(folder / identifier, note))}", flush=True)
        if now == "interrupted":
            again = [sys.executable, __file__, "trial", *note["words"]]
            code, asked = supervise(again, {**note["environment"], "SWEEP_FOLDER": str(folder)})
            failure = remember(folder, identifier, code) or failure
            if asked:
                return failure, True
    return failure, False


def remember(folder: Path, identifier: str, code: int) -> int:
    """Note a failure that another attempt would bring again; returns the code of any failure."""
    if code not in REPEATABLE or is_running(folder / identifier):
        return code if code != INTERRUPTED else 0
    path = folder / f"{identifier}.json"
    if path.exists():
        publish_text(path, json.dumps({**json.loads(path.read_text()), "exit code": code}, indent=1))
    return code


def resume(folder: Path, command: Sequence[str]) -> int:
    """Finish what was cut off, then run the command, and finish what that has left."""
    failure, asked = finish(folder)
    if command and not asked:
        code, asked = supervise(command, {"SWEEP_FOLDER": str(folder)}, agent=True)
        after, asked = (0, True) if asked else finish(folder)
        failure = code or after or failure
    return INTERRUPTED if asked else failure


def local(path: Path, count: int, folder: Path, seed: int, options: Sequence[str]) -> int:
    """Run trials of a sweep file, as an agent would, one after the other."""
    sweep = load(path)
    if sweep["method"] != "grid":
        print(f"sweep: drawn at random, not by `{sweep['method']}`", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    salt = folder / ".salt"  # ids are new in each folder, and the same when the command is run again
    if not salt.exists():
        publish_text(salt, secrets.token_hex(16))
    failure = 0
    for number, values in enumerate(itertools.islice(points(sweep, seed), count)):
        identifier = hashlib.sha256(f"{salt.read_text()} {number}".encode()).hexdigest()[:8]
        note = notes(folder).get(identifier, {"parameters": values})
        if note["parameters"] != values:
            raise UsageError(f"{folder}: holds trials of another sweep or --seed; choose another --out")
        if state(folder / identifier, note) in ("finished", "stopped"):
            continue
        print(f"sweep: {identifier}: " + ", ".join(f"{name} {value}" for name, value in values.items()), flush=True)
        drawn_values = {name: {"desc": None, "value": value} for name, value in values.items()}
        parameters = folder / f".{identifier}.yaml"
        publish_text(parameters, yaml.safe_dump({"wandb_version": 1, **drawn_values}, sort_keys=False))
        environment = {"WANDB_MODE": "offline", "WANDB_RUN_ID": identifier, "SWEEP_FOLDER": str(folder),
                       "WANDB_RUN_GROUP": sweep.get("name", path.stem), "WANDB_SWEEP_PARAM_PATH": str(parameters),
                       "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
        code, asked = supervise([*command_of(sweep, values), *options], environment)
        failure = remember(folder, identifier, code) or failure
        if asked:
            return INTERRUPTED
    table(folder, sweep["metric"]["name"])
    return failure


def load(path: Path) -> dict[str, Any]:
    """A sweep file."""
    sweep: dict[str, Any] = read_yaml(path) or {}
    if missing := [key for key in ("method", "metric", "parameters", "command") if key not in sweep]:
        raise UsageError(f"{path}: found no {', '.join(missing)}, expected a sweep file like those of configs/sweep")
    return sweep


def command_of(sweep: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """A sweep's command with its macros replaced, as W&B's agent does it."""
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": ["python"],
        "${program}": [sweep.get("program", "")],
        "${args}": [f"--{name}={value}" for name, value in values.items()],
    }
    words: list[str] = []
    for word in map(str, sweep["command"]):
        named = re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda found: os.environ.get(found[1], found[1]), word)
        words += macros.get(named, [named])
    return words


# What came out.


def table(folder: Path, metric: str) -> None:
    """Show all trials, the best first; `table.md` and `table.csv` hold the same."""
    trials = notes(folder)
    if not trials:
        raise UsageError(f"{folder}: found no trial, expected the folder of a sweep's trials")
    options = list(dict.fromkeys(name for note in trials.values() for name in note["parameters"]))
    values = [{str(note["parameters"].get(name)) for note in trials.values()} for name in options]
    varied = [name for name, seen in zip(options, values, strict=True) if len(seen) > 1 or len(trials) == 1]
    header = ["trial", *varied, f"best {metric} %", "after steps", f"last {metric} %", "steps", "state"]
    from organseg.runtime.metrics_log import read_metrics  # heavy: agents need not wait for it

    rows = []
    for identifier, note in trials.items():
        numbers = read_metrics(folder / identifier / "metrics.csv")
        scores = [(value, step) for step, name, value in numbers if name == metric]
        best, at = max(scores, key=lambda pair: (pair[0], -pair[1]), default=(-1.0, 0))
        shown = [cell(note["parameters"].get(name)) for name in varied]
        last = [f"{100 * best:.1f}", str(at + 1), f"{100 * scores[-1][0]:.1f}"] if scores else ["", "", ""]
        steps = max((step + 1 for step, *_ in numbers), default=0)
        rows.append((-best, [identifier, *shown, *last, str(steps), state(folder / identifier, note)]))
    lines = [header, *(row for _, row in sorted(rows))]
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows(lines)
    publish_text(folder / "table.csv", text.getvalue())
    lines.insert(1, ["---"] * len(header))
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    publish_text(folder / "table.md", markdown)
    print(markdown, end="")


def cell(value: Any) -> str:
    """A value for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str]) -> int:
    """Run one of the commands."""
    if argv[:1] == ["trial"]:
        trial(argv[1:])
    words, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("trial", help="what a sweep file names as its command")
    resuming = commands.add_parser("resume", help="go on with trials that were cut off, then run a command")
    resuming.add_argument("folder", type=Path)
    agent = commands.add_parser("local", help="draw values and run trials, without a server")
    agent.add_argument("sweep", type=Path)
    agent.add_argument("--out", type=Path, required=True, help="folder of the trials")
    agent.add_argument("--count", type=int, default=4)
    agent.add_argument("--seed", type=int, default=0)
    shown = commands.add_parser("table", help="all trials of a folder, the best first")
    shown.add_argument("folder", type=Path)
    shown.add_argument("--metric", default="val/dsc")
    arguments = parser.parse_args(words)
    if arguments.command == "resume":
        return resume(arguments.folder, rest)
    if arguments.command == "local":
        return local(arguments.sweep, arguments.count, arguments.out, arguments.seed, rest)
    table(arguments.folder, arguments.metric)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OrgansegError as error:
        print(f"sweep: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
