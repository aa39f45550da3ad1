"""DDP whose ranks end together (FAULTS.md 6).

Lightning's launcher kills everything with SIGKILL as soon as a rank ends with an error, so that nobody says why and a
rank that writes a checkpoint is cut off; a rank whose launcher was killed lives on; and a stuck rank is waited for
half an hour. Here ranks get time to end by themselves, die with their launcher, and wait as long as they are told.
"""

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta

import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from organseg.errors import Interrupted, WorkerError
from organseg.processes import RANK_0_PID
from organseg.runtime.signals import held_back

PATIENCE_S = 20.0
"""For the other ranks to end by themselves, after one failed."""
PATIENCE_TO_SAVE_S = 120.0
"""After one ended because it was asked to: rank 0 may still be writing."""

_children: list[subprocess.Popen[bytes]] = []
"""The ranks that this process launched."""


class GuardedDDP(DDPStrategy):
    """`--trainer.strategy ddp`, and what `auto` chooses with several devices."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class _Launcher(_SubprocessScriptLauncher):
    def _call_children_scripts(self) -> None:
        os.environ[RANK_0_PID] = str(os.getpid())
        with held_back():
            super()._call_children_scripts()
        _children[:] = self.procs
        _watch()
        self.procs = []  # nothing for Lightning's own observer to see


def guard_ranks(timeout_s: float) -> None:
    """Make `ddp` mean ranks that end together; to be called before a trainer is made.

    Args:
        timeout_s: That a rank waits for the others before it gives up.
    """
    StrategyRegistry.register("ddp", GuardedDDP, override=True, timeout=timedelta(seconds=timeout_s))


def _watch() -> None:
    """End this process, in time, if it outlives a rank that failed."""

    def watch() -> None:
        while not any(codes := [child.poll() for child in _children]):
            if all(code == 0 for code in codes):
                return
            time.sleep(0.5)
        asked = set(codes) <= {None, 0, Interrupted.exit_code}
        time.sleep(PATIENCE_TO_SAVE_S if asked else PATIENCE_S)
        print(f"organseg: {_ended()}, and rank 0 waited for it in vain", file=sys.stderr, flush=True)
        for child in _children:
            child.kill()
        os._exit(WorkerError.exit_code)

    threading.Thread(target=watch, daemon=True, name="ranks").start()


def _ended() -> str:
    """Which of the launched ranks ended early, and how."""
    found = []
    for rank, child in enumerate(_children, start=1):
        code = child.poll()
        if code:
            found.append(f"rank {rank} " + (f"was killed by signal {-code}" if code < 0 else f"ended with {code}"))
    return " and ".join(found)


def lost_rank(error: BaseException | None) -> WorkerError | None:
    """What to tell where an error means that another rank is gone or stuck, or that a loader worker died."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        said = str(error)
        if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in said):
            time.sleep(0.5)  # a rank that was killed an instant ago is not waited for yet
            rank = os.environ.get("SLURM_PROCID", os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
            why = _ended() or "what that rank or its node said last tells why"
            return WorkerError(f"rank {rank} lost another rank: {why} ({' '.join(said.split())[:160]})")
        if isinstance(error, RuntimeError) and said.startswith("DataLoader"):
            return WorkerError(
                f"{' '.join(said.split())[:200]}; a worker that is killed often had too little memory or shared "
                "memory: fewer data.init_args.workers, and see `organseg doctor`"
            )
        error = error.__cause__ or error.__context__
    return None
