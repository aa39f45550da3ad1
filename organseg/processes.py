"""Worker processes that never outlive who started them, and memory that does not page-fault."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def in_processes(work: Callable[[Item], Result], items: Sequence[Item], processes: int) -> Iterator[Result]:
    """Results of a picklable function over items, in order, from worker processes that die with this one."""
    if processes <= 1 or len(items) <= 1:
        yield from map(work, items)
        return
    # spawn: a fork of a process in which torch, HDF5 or a progress bar run threads may hang
    count = min(processes, len(items))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        yield from pool.map(work, items)


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent dies (Linux; elsewhere nothing happens)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)  # it died before the kernel knew whom to watch


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
