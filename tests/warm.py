"""The real command in a real process that need not import anything first: half of the tests' time would be imports.

A fork server imports what the command imports, and each process is forked from it: it has its own pid, process group,
signals and exit code, and dies as any other. With `ORGANSEG_COLD=1`, and where a test asks for it, the interpreter is
started anew instead.
"""

import atexit
import contextlib
import importlib
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_IMPORTS = [
    "organseg.cli.training", "organseg.cli.prediction", "organseg.cli.analysis", "organseg.cli.commands",
    "organseg.methods", "organseg.networks", "organseg.data", "organseg.report", "hdf5plugin", "torch._dynamo",
]  # fmt: skip
TOOLS = Path(__file__).parents[1] / "tools"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_IMPORTS)


def environment_of(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a process of the tests: one thread, no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(more or {})}


class Warm:
    """`subprocess.Popen` of `python -m organseg`, as far as the tests need it: leads a process group of its own.

    `main` takes the words and ends the process with their exit code.
    """

    def __init__(
        self,
        main: Callable[[list[str]], None],
        words: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path | None,
        out: Path | str,
        err: Path | str,
    ) -> None:
        before = dict(os.environ)
        os.environ.update(environment_of())  # the first one starts the server
        try:
            place = str(cwd or Path.cwd())
            self._process = _CONTEXT.Process(target=_run, args=(main, list(words), dict(environment), place, out, err))
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        while self.poll() is None and not self._leads():
            time.sleep(0.002)

    def _leads(self) -> bool:
        """Whether it has its own group by now, so that a signal to the group is one to it."""
        try:
            return os.getsid(self.pid) == self.pid
        except ProcessLookupError:
            return True

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, -n where signal n killed it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("organseg", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """To it alone, unless it has just ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def start(
    words: Sequence[str],
    more: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    out: Path | str = os.devnull,
    err: Path | str = os.devnull,
    cold: bool = False,
) -> "Warm | subprocess.Popen[bytes]":
    """Start the command with further environment variables; its output goes to files."""
    environment = environment_of(more)
    if not (cold or os.environ.get("ORGANSEG_COLD")):
        return Warm(_command, words, environment, cwd, out, err)
    with Path(out).open("wb") as output, Path(err).open("wb") as errors:
        return subprocess.Popen([sys.executable, "-m", "organseg", *words], env=environment, cwd=cwd, stdout=output,
                                stderr=errors, start_new_session=True)  # fmt: skip


def signal_group(process: "Warm | subprocess.Popen[bytes]", number: int) -> None:
    """Signal the process and what it has started, unless it has just ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def end_of(process: "Warm | subprocess.Popen[bytes]", timeout: float) -> int:
    """Its exit code, once it and all that it has started have ended; what does not end is killed, and a failure."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        signal_group(process, signal.SIGKILL)
        raise
    deadline = time.monotonic() + 5
    while (left := _group(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        signal_group(process, signal.SIGKILL)
        raise AssertionError(f"exit {code}, but processes were left behind: {left}")
    return code


def _group(leader: int) -> dict[int, str]:
    """Command lines of the living processes of a group."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (place / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it ended while we looked
    return found


def run(
    words: Sequence[str], cwd: Path | None = None, timeout: float = 300, cold: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        return _ended(start(words, None, cwd, out, err, cold), words, out, err, timeout)


def run_tool(name: str, *words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a script of `tools/` to its end; it is warm, and so are the commands that it runs."""
    command = [str(TOOLS / f"{name}.py"), *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        if os.environ.get("ORGANSEG_COLD"):
            with out.open("wb") as output, err.open("wb") as errors:
                process: Warm | subprocess.Popen[bytes] = subprocess.Popen(
                    [sys.executable, *command], env=environment_of(), stdout=output, stderr=errors,
                    start_new_session=True,
                )  # fmt: skip
        else:
            process = Warm(_tool, command, environment_of(), None, out, err)
        return _ended(process, command, out, err, timeout)


def _ended(
    process: "Warm | subprocess.Popen[bytes]", words: Sequence[str], out: Path, err: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Of a process that writes into files."""
    try:
        code = end_of(process, timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{words}: no end in {timeout} s\n{out.read_text()}\n{err.read_text()}") from None
    return subprocess.CompletedProcess(list(words), code, out.read_text(), err.read_text())


def _run(
    main: Callable[[list[str]], None],
    words: list[str],
    environment: dict[str, str],
    cwd: str,
    out: Path | str,
    err: Path | str,
) -> None:
    """What a fresh interpreter would have done until it calls the command."""
    os.setsid()
    for stream, path in ((1, out), (2, err)):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, stream)
        os.close(target)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    missing = [name for name in _IMPORTS if name not in sys.modules]
    assert not missing, f"the fork server could not import {missing}"
    places = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:0] = places
    for place in places:
        if (Path(place) / "sitecustomize.py").exists():
            runpy.run_path(str(Path(place) / "sitecustomize.py"))
    multiprocessing.set_start_method(None, force=True)  # as in an interpreter that nobody forked
    random.seed()
    importlib.import_module("numpy").random.seed()  # what is drawn without a seed must differ between processes
    tempfile.tempdir = None
    main(words)


def _command(words: list[str]) -> None:
    """`python -m organseg`, in a process that is settled."""
    sys.argv = ["organseg", *words]
    main = importlib.import_module("organseg.__main__")
    sys.modules["__main__"] = main  # Lightning starts further ranks by its name
    code = main.main()
    atexit._run_exitfuncs()
    sys.exit(code)


def _tool(words: list[str]) -> None:
    """`python SCRIPT`, whose commands are forks of this process."""

    def forked(command: Sequence[str], check: bool = False, **options: object) -> subprocess.CompletedProcess[bytes]:
        assert list(command[:3]) == [sys.executable, "-m", "organseg"] and not options, command
        sys.stdout.flush()
        child = os.fork()
        if not child:
            code = 1
            try:
                _command(list(command[3:]))
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if check and code:
            raise subprocess.CalledProcessError(code, list(command))
        return subprocess.CompletedProcess(list(command), code)

    subprocess.run = forked
    sys.argv = words
    sys.path.insert(0, str(TOOLS))
    runpy.run_path(words[0], run_name="__main__")
    atexit._run_exitfuncs()
