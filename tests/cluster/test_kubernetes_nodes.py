"""What the two pods of the TrainJob start, started for real as two processes on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_kubernetes import action, container_of, expanded, here, read
from toy import TOY, organseg


def nodes(folder: Path, steps_before_stop: bool) -> list[int]:
    """Start what the two pods of the TrainJob start, and stop the second one if asked to; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    container, started = container_of("train_job.yaml"), []
    for node in range(read("train_job.yaml")["spec"]["trainer"]["numNodes"]):
        command = expanded(container["command"], "train_job.yaml", node)[3:]  # without the image's init process
        args = here(expanded(container["args"], "train_job.yaml", node))
        short = [*TOY, "--trainer.devices=1", "--trainer.max_steps=60", "--trainer.val_check_interval=60"]
        words = [word.replace("MASTER_PORT=29400", f"MASTER_PORT={port}") for word in [*command, *args, *short]]
        started.append(subprocess.Popen(words, cwd=folder, env=environment, start_new_session=True))
    try:
        metrics, deadline = folder / "runs" / "mine_ddp" / "metrics.csv", time.monotonic() + 200
        while steps_before_stop and not (metrics.exists() and "train" in metrics.read_text()):
            assert time.monotonic() < deadline and all(process.poll() is None for process in started)
            time.sleep(0.1)
        if steps_before_stop:
            os.killpg(started[1].pid, signal.SIGTERM)  # as `tini -g` does
        return [process.wait(200) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.alone
def test_a_signal_to_one_pod_ends_both_so_that_new_pods_go_on(tmp_path: Path) -> None:
    shape = ("--shape", 24, 32, 32)
    organseg("phantom", "--cases", 6, *shape, "--out", "phantoms", "--processes", 1, cwd=tmp_path)
    organseg("prepare", "phantoms/dataset.yaml", "--out", "cache", "--processes", 1, cwd=tmp_path)
    codes = nodes(tmp_path, steps_before_stop=True)
    assert {action("train_job.yaml", code) for code in codes} == {"Ignore"}, codes
    assert nodes(tmp_path, steps_before_stop=False) == [0, 0]
