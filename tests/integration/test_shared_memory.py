"""Where shared memory is small, as in a container, there are fewer loader workers instead of dead ones."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rounds import weights
from toy import TOY, organseg

from organseg.processes import affordable_workers, default_workers

CONFIG = Path(__file__).parents[2] / "configs" / "experiment" / "phantom_30_inerrant0.yaml"


def test_as_many_workers_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=6000))
    assert affordable_workers(4, batch_bytes=500, ranks=1, shared=tmp_path) == 4
    assert affordable_workers(4, batch_bytes=500, ranks=2, shared=tmp_path) == 2
    assert affordable_workers(4, batch_bytes=3000, ranks=1, shared=tmp_path) == 0
    assert affordable_workers(4, batch_bytes=10**9, ranks=1, shared=tmp_path / "none") == 4


@pytest.mark.parametrize(("slurm", "threads", "ranks", "workers"), [
    ("", "", 1, 16), ("", "", 4, 15), ("", "", 16, 3), ("", "", 64, 2), ("8", "1", 4, 7), ("", "4", 1, 3),
    ("", "8", 2, 3), ("", "128", 4, 15),
])  # fmt: skip
def test_workers_of_a_rank_where_nobody_says_how_many(
    slurm: str, threads: str, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("organseg.processes.usable_cores", lambda: 64)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert default_workers(ranks) == workers


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a mount needs root")
def test_a_fit_with_hardly_any_shared_memory_trains_the_same_network(toy: Path, tmp_path: Path) -> None:
    words = ["fit", "--config", CONFIG, "--data.init_args.cache", toy / "cache", *TOY, "--trainer.max_steps=3"]
    organseg(*words, "--out", tmp_path / "whole")
    small = [sys.executable, "-m", "organseg", *words, "--data.init_args.workers=2", "--out", tmp_path / "small"]
    script = f"mount -t tmpfs -o size=32k tmpfs /dev/shm && exec {shlex.join(map(str, small))}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "/dev/shm has no room for the batches of 2 loader workers: 0 instead" in done.stderr
    assert weights(tmp_path / "small/checkpoints/last.ckpt") == weights(tmp_path / "whole/checkpoints/last.ckpt")
