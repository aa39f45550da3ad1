"""Python imports this before anything else where its folder is on PYTHONPATH: it kills the process group at a write.

An audit hook sees every opening, renaming and linking of a file before it happens. The product is not touched: its own
processes make real files and die a real death, at a place that a test names (`rounds.killed_at`).
"""

import os
import re
import signal
import sys
from typing import Any


def _watch(run: str, pattern: re.Pattern[str], later: int) -> None:
    left = -1
    log = os.open(f"{run}.writes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            path, writes = args[0], args[2] & (os.O_WRONLY | os.O_RDWR)
        elif event in ("os.rename", "os.link"):
            path, writes = args[1], True
        else:
            return
        if not writes or not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(run + os.sep):
            return
        line = f"{event} {os.fspath(path)[len(run) + 1 :]}"
        if left < 0 and pattern.search(line):
            left = later + 1
        if left > 0:
            left -= 1
        os.write(log, f"{line}{' killed' * (left == 0)}\n".encode())
        if left == 0:
            os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)


if "KILL_IN" in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
    _watch(os.environ["KILL_IN"], re.compile(os.environ["KILL_AT"]), int(os.environ["KILL_LATER"]))
