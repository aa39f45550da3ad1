"""Worker processes that never outlive who started them, requests to stop, and memory that does not page-fault."""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

from organseg.errors import WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""With which a person, a scheduler or a container asks to stop."""

RANK_0_PID = "ORGANSEG_RANK_0_PID"
"""In the environment of a rank: who launched it."""

_MOST_WORKERS = 16
"""Of a rank, where nobody says how many."""
_BATCHES_AHEAD = 2
"""That torch's loader asks of each worker."""
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


_ONE_REQUEST_S = 2.0
"""Signals of schedulers within it are one request: SLURM and torchrun send the same one twice in a moment."""


class StopRequest:
    """Remembers that a signal asked to stop; a second request ends the process as if nobody had listened.

    Handlers belong to the process, so there is one request for all of it. The handler sets a flag and nothing else:
    saving inside it would catch the optimiser in the middle of a step, and a collective inside it would wait for ranks
    that know of no signal. Who can stop looks at the flag, between two steps or two cases, on all ranks together.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0

    def listen(self, *numbers: int) -> None:
        """Take these signals, by default all that ask to stop, except what the process was started to ignore."""
        for number in numbers or STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = True, now
        elif number == signal.SIGINT or now - self._since > _ONE_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


STOP = StopRequest()
"""Of this process."""


class LosableOutput:
    """An output that may be closed, full or read by nobody any more: the work goes on, with a warning if there is room.

    Args:
        stream: Where it goes; None where the process was started without.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or Path(os.devnull).open("w")  # noqa: SIM115 - kept

    def write(self, text: str) -> int:
        """As the stream does."""
        return self._or_lose(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """As the stream does."""
        self._or_lose(self._stream.flush)

    def _or_lose(self, work: Callable[[], Result]) -> Result | None:
        try:
            return work()
        except OSError as error:
            # The descriptor, not the object: what lies in the stream's buffer and what libraries print go there too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            with contextlib.suppress(OSError):  # it may be the same place
                print(f"organseg: warning: an output is lost: {error.strerror}; going on without it", file=sys.stderr)
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def in_processes(work: Callable[[Item], Result], items: Sequence[Item], processes: int) -> Iterator[Result]:
    """Results of a picklable function over items, in order, from worker processes that die with this one.

    Raises:
        WorkerError: If one of them was killed.
    """
    if processes <= 1 or len(items) <= 1:
        yield from map(work, items)
        return
    # spawn: a fork of a process in which torch, HDF5 or a progress bar run threads may hang
    count = min(processes, len(items))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            yield from pool.map(work, items)
        except BrokenProcessPool as error:
            few = "perhaps for want of memory; run it again, with fewer --processes"
            raise WorkerError(f"one of {count} worker processes was killed, {few}") from error


def end_with_parent() -> None:
    """Make this process die with its parent; for workers, to whom an interrupt means nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    parent = parent_process()
    die_with_parent(os.getppid() if parent is None or parent.pid is None else parent.pid)


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent dies, however that dies (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before the kernel knew whom to watch


def die_with_launcher() -> None:
    """Where this is a rank that Lightning's launcher or torchrun started, die with it; before heavy imports."""
    if launched_by_rank_0():
        die_with_parent(int(os.environ.get(RANK_0_PID, os.getppid())))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())


def launched_by_rank_0() -> bool:
    """Whether Lightning's own launcher started this process."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


def as_loader_worker(_: int = 0) -> None:
    """Ignore what asks to stop, which a whole group may get, and die with the rank instead."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(os.getppid())


def end_loader_workers() -> None:
    """Kill what is left of them: at its end Python would ask them to stop, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a failure
    for child in active_children():
        child.kill()


def default_workers(ranks: int) -> int:
    """Loader workers of a rank where nobody says how many: a core each, one left for the rank itself.

    Args:
        ranks: On this machine, which share its cores unless SLURM gave each its own.
    """
    own = _number_of("SLURM_CPUS_PER_TASK")
    # A pod sees all cores of its node; the manifests say there how many are its own. 1 is torchrun's default.
    threads = _number_of("OMP_NUM_THREADS")
    cores = own or (min(threads, usable_cores()) if threads > 1 else usable_cores()) // ranks
    return max(2, min(_MOST_WORKERS, cores - 1))


def _number_of(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


def affordable_workers(wanted: int, batch_bytes: int, ranks: int, shared: Path = Path("/dev/shm")) -> int:
    """Loader workers of each rank whose batches find room in shared memory, through which they hand them over.

    Args:
        wanted: Workers of a rank.
        batch_bytes: Of a rank's batch.
        ranks: On this machine.
        shared: Where shared memory lies; a container often has 64 MB of it.
    """
    if not shared.is_dir():
        return wanted
    free = shutil.disk_usage(shared).free // ranks
    return min(wanted, free // max((_BATCHES_AHEAD + 1) * batch_bytes, 1))


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them to the kernel.

    A training step frees and asks for the same hundreds of megabytes again; returned blocks cost a page fault each
    4 kB, which can halve the speed on CPUs. No effect where the C library is another one.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
