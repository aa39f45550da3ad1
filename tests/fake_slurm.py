"""SLURM for tests: `sbatch`, `srun` and `scontrol` with the options that the scripts use, and no others.

Options and variables are named as SLURM names them; an option that is not known here ends with an error, as there. Jobs
run at once, one after another; each node can be a network namespace. `$FAKE_SLURM` is a folder: `nodes` lists the
namespaces (or nothing: this machine), `tasks` gets a file a running task, `requeued` what was asked to come back.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol")


def matching(pattern: str):  # type: ignore[no-untyped-def]
    """An option's value that must have a form."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not like {pattern}")
        return text

    return check


def sbatch_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sbatch", allow_abbrev=False)
    parser.add_argument("-N", "--nodes", type=int, default=1)
    parser.add_argument("--ntasks-per-node", type=int)
    parser.add_argument("-c", "--cpus-per-task", type=int)
    parser.add_argument("--gres", type=matching(r"none|gpu(:\w+)?:\d+"))
    parser.add_argument("-a", "--array", type=matching(r"\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?"))
    parser.add_argument("-t", "--time", type=matching(r"(\d+-)?\d+(:\d\d){0,2}"))
    parser.add_argument("-J", "--job-name", default="sbatch")
    parser.add_argument("-o", "--output", type=matching(r"([^%]|%[xjAa])+"), default="slurm-%j.out")
    parser.add_argument("--open-mode", choices=("append", "truncate"), default="truncate")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--signal", type=matching(r"([RB]{1,2}:)?(USR1|USR2|TERM|INT)(@\d+)?"))
    parser.add_argument("--export", default="ALL")
    parser.add_argument("script", type=Path)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    return parser


def directives(script: Path) -> list[str]:
    """The words of its #SBATCH lines, up to the first command."""
    words: list[str] = []
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH"):
            words += shlex.split(line.removeprefix("#SBATCH"), comments=True)
        elif line.strip() and not line.startswith("#"):
            break
    return words


def sbatch(argv: Sequence[str]) -> int:
    """Run a job, or the tasks of an array, until each has ended without asking to come back."""
    parser, state = sbatch_parser(), Path(os.environ["FAKE_SLURM"])
    script = parser.parse_args(argv).script
    job = parser.parse_args([*directives(script), *argv])
    first = 1000 + len(list(state.glob("job-*")))
    (state / f"job-{first}").write_text(shlex.join(argv))
    print(f"Submitted batch job {first}", flush=True)
    tasks = numbers(job.array) if job.array else [0]
    worst = 0
    for number, task in enumerate(tasks, start=first):
        extra = {}
        if job.array:
            extra = {"SLURM_ARRAY_JOB_ID": f"{first}", "SLURM_ARRAY_TASK_ID": f"{task}",
                     "SLURM_ARRAY_TASK_COUNT": f"{len(tasks)}", "SLURM_ARRAY_TASK_MIN": f"{min(tasks)}",
                     "SLURM_ARRAY_TASK_MAX": f"{max(tasks)}"}  # fmt: skip
        name = f"{first}_{task}" if job.array else f"{number}"
        restarts = 0
        while True:
            if restarts:
                extra["SLURM_RESTART_COUNT"] = f"{restarts}"
            code = run_batch(job, number, extra)
            asked = state / "requeued" / name
            if not (job.requeue and asked.exists()):
                break
            asked.unlink()
            restarts += 1
        worst = max(worst, code)
    return worst


def numbers(array: str) -> list[int]:
    """The tasks of `--array`."""
    found: list[int] = []
    for part in array.partition("%")[0].split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def run_batch(job: argparse.Namespace, number: int, extra: dict[str, str]) -> int:
    """The script, as SLURM starts it on the first node."""
    nodes = [f"node{n}" for n in range(1, job.nodes + 1)]
    variables = {
        "SLURM_JOB_ID": number, "SLURM_JOB_NAME": job.job_name, "SLURM_NNODES": job.nodes,
        "SLURM_JOB_NUM_NODES": job.nodes, "SLURM_JOB_NODELIST": ",".join(nodes), "SLURM_NODELIST": ",".join(nodes),
        "SLURM_SUBMIT_DIR": Path.cwd(), "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0,
    }  # fmt: skip
    if job.cpus_per_task:
        variables["SLURM_CPUS_PER_TASK"] = job.cpus_per_task
    if job.ntasks_per_node:
        variables["SLURM_NTASKS_PER_NODE"] = job.ntasks_per_node
        variables["SLURM_NTASKS"] = job.nodes * job.ntasks_per_node
    known = {"x": job.job_name, "j": f"{number}", "A": extra.get("SLURM_ARRAY_JOB_ID", f"{number}"),
             "a": extra.get("SLURM_ARRAY_TASK_ID", "0")}  # fmt: skip
    log = re.sub(r"%(\w)", lambda found: known[found[1]], job.output)
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}, **extra}
    with Path(log).open("a" if job.open_mode == "append" else "w") as file:
        batch = subprocess.Popen(["bash", job.script, *job.words], env=environment, stdout=file, stderr=file)
        (Path(os.environ["FAKE_SLURM"]) / "batch").write_text(f"{batch.pid}")
        return batch.wait()


def srun(argv: Sequence[str]) -> int:
    """Start the job's tasks on its nodes; the highest exit code is returned, a signal as 128 + n."""
    parser = argparse.ArgumentParser("srun", allow_abbrev=False)
    parser.add_argument("-c", "--cpus-per-task", type=int)
    parser.add_argument("-K", "--kill-on-bad-exit", choices=("0", "1"))
    parser.add_argument("-W", "--wait", type=float, default=0.0)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    step = parser.parse_args(argv)
    state = Path(os.environ["FAKE_SLURM"])
    spaces = (state / "nodes").read_text().split() if (state / "nodes").exists() else []
    per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    tasks: list[subprocess.Popen[bytes]] = []
    for node in range(int(os.environ["SLURM_NNODES"])):
        inside = ["ip", "netns", "exec", spaces[node]] if spaces else []
        for local in range(per_node):
            rank = node * per_node + local
            variables = {"SLURM_PROCID": f"{rank}", "SLURM_LOCALID": f"{local}", "SLURM_NODEID": f"{node}",
                         "SLURM_STEP_ID": "0", "SLURM_STEPID": "0"}  # fmt: skip
            tasks.append(subprocess.Popen([*inside, *step.words], env={**os.environ, **variables}))
            (state / "tasks" / f"{rank}").write_text(f"{tasks[-1].pid}")
    ended_at = None
    while any(task.poll() is None for task in tasks):
        time.sleep(0.05)
        if ended_at is None and any(task.poll() is not None for task in tasks):
            ended_at = time.monotonic()
        if ended_at is not None and step.wait and time.monotonic() - ended_at > step.wait:
            for task in tasks:
                task.kill()
    for path in (state / "tasks").iterdir():
        path.unlink()
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scontrol(argv: Sequence[str]) -> int:
    """`show hostnames LIST` and `requeue ID`."""
    if list(argv[:2]) == ["show", "hostnames"] and len(argv) == 3:
        print("\n".join(argv[2].split(",")))
        return 0
    if argv[0] == "requeue" and len(argv) == 2:
        (Path(os.environ["FAKE_SLURM"]) / "requeued" / argv[1]).write_text("")
        return 0
    print(f"scontrol: invalid keyword: {shlex.join(argv)}", file=sys.stderr)
    return 1


def install(folder: Path) -> dict[str, str]:
    """Put the three commands into a folder; returns the environment in which they are found."""
    for name in ("bin", "state/tasks", "state/requeued"):
        (folder / name).mkdir(parents=True)
    for name in COMMANDS:
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {name} "$@"\n')
        command.chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": f"{folder / 'state'}"}


class Slurm:
    """A cluster of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**install(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.state = folder / "state"

    def start(self, *words: object, **more: str) -> subprocess.Popen[str]:
        """`sbatch` with these words."""
        return subprocess.Popen(
            ["sbatch", *map(str, words)], env={**self.environment, **more}, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def submit(self, *words: object, **more: str) -> int:
        """`sbatch`, and wait for all that it starts."""
        process = self.start(*words, **more)
        self.said, _ = process.communicate(timeout=500)
        return process.returncode

    def tasks(self) -> list[int]:
        """Process ids of the running tasks, by rank."""
        return [int(path.read_text()) for path in sorted((self.state / "tasks").iterdir(), key=lambda p: int(p.name))]

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


def recorder(folder: Path, *codes: int) -> str:
    """A command in the place of organseg that keeps its words and ends with these codes, one a start."""
    path = folder / "recorder"
    path.write_text(
        f"#!/bin/bash\nprintf '%s\\n' \"$(printf '%q ' \"$@\")\" >> {folder}/words\n"
        f"codes=({' '.join(map(str, codes))})\nexit ${{codes[$(($(wc -l < {folder}/words) - 1))]}}\n"
    )
    path.chmod(0o755)
    return str(path)


def recorded(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "words").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
