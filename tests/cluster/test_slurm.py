"""The SLURM script, with `sbatch`, `srun` and `scontrol` that check their options; two nodes are network namespaces."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_slurm import Slurm, recorded, recorder
from rounds import TWO_RANKS, command, journal, losses, results
from toy import organseg

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "cluster" / "slurm" / "organseg.sbatch"


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path / "cluster")


@pytest.fixture
def two_nodes(slurm: Slurm) -> Iterator[Slurm]:
    """Nodes that reach each other over the network alone, each under a name of its own."""
    names = [f"organseg{os.getpid()}n{n}" for n in (1, 2)]
    try:
        ip("netns", "add", names[0])
        ip("netns", "delete", names[0])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces cannot be made here")  # not root, or a container without the right to
    hosts = [Path("/etc/netns") / name for name in names]
    try:
        for number, (name, folder) in enumerate(zip(names, hosts, strict=True), start=1):
            ip("netns", "add", name)
            folder.mkdir(parents=True)
            own = f"10.231.7.{number} {socket.gethostname()}\n"
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n10.231.7.1 node1\n10.231.7.2 node2\n{own}")
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.231.7.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        (slurm.state / "nodes").write_text(" ".join(names))
        yield slurm
    finally:
        for name, folder in zip(names, hosts, strict=True):
            ip("netns", "delete", name)
            (folder / "hosts").unlink(missing_ok=True)
            folder.rmdir()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def test_the_script_passes_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, "--severity=style", *SCRIPT.parent.iterdir()], check=True)
    unquoted = subprocess.run([shellcheck, "-"], input="#!/bin/bash\nls $1\n", text=True, stdout=subprocess.DEVNULL)
    assert unquoted.returncode == 1


def test_an_option_that_slurm_does_not_have_is_refused(slurm: Slurm) -> None:
    assert slurm.submit("--gpu", "2", SCRIPT, "fit") == 2
    assert slurm.submit("--signal", "SIGUSR1@300", SCRIPT, "fit") == 2


def test_a_fit_gets_the_nodes_and_tasks_of_the_job(slurm: Slurm) -> None:
    words = ("--nodes", 2, "--ntasks-per-node", 2, "--gres", "gpu:2", SCRIPT, "fit", "--out", "a run")
    assert slurm.submit(*words, ORGANSEG=recorder(slurm.folder, 0, 0, 0, 0)) == 0
    wanted = ["fit", "--out", "a run", "--trainer.num_nodes", "2", "--trainer.devices", "2"]
    assert recorded(slurm.folder) == 4 * [wanted]


def test_an_array_gives_each_task_its_number(slurm: Slurm) -> None:
    words = ("--array", "0-2", SCRIPT, "prepare", "mine.yaml", "--out", "cache", "--shard", "%a/%n")
    assert slurm.submit(*words, ORGANSEG=recorder(slurm.folder, 0, 3, 0)) == 3
    assert [words[-1] for words in recorded(slurm.folder)] == ["0/3", "1/3", "2/3"]
    assert {tuple(words[:-1]) for words in recorded(slurm.folder)} == {
        ("prepare", "mine.yaml", "--out", "cache", "--shard")
    }


@pytest.mark.parametrize("array", ["0,5", "3", "1-8"])
def test_the_number_of_tasks_is_not_guessed_where_some_are_submitted_again(array: str, slurm: Slurm) -> None:
    words = ("--array", array, SCRIPT, "prepare", "mine.yaml", "--out", "cache", "--shard")
    assert slurm.submit(*words, "%a/%n", ORGANSEG=recorder(slurm.folder, *[0] * 8)) == 2
    assert not (slurm.folder / "words").exists() and "write it out: --shard %a/8" in slurm.log
    assert slurm.submit(*words, "%a/9", ORGANSEG=recorder(slurm.folder, *[0] * 8)) == 0
    assert recorded(slurm.folder)[0][-1] == f"{array[0]}/9"


@pytest.mark.parametrize(("array", "codes", "starts"), [
    ((), (75, 138, 0), 3), (("--array", "1-2"), (75, 0, 75, 0), 4), ((), (6, 0), 1), ((), (2, 0), 1),
])  # fmt: skip
def test_what_was_interrupted_comes_back_and_nothing_else(
    array: tuple[str, ...], codes: tuple[int, ...], starts: int, slurm: Slurm
) -> None:
    code = slurm.submit(*array, SCRIPT, "fit", ORGANSEG=recorder(slurm.folder, *codes))
    assert code == codes[starts - 1]
    assert len(recorded(slurm.folder)) == starts


def test_a_requeued_job_does_not_start_anew(slurm: Slurm) -> None:
    words = (SCRIPT, "fit", "--overwrite", "--out", "x")
    assert slurm.submit(*words, ORGANSEG=recorder(slurm.folder, 75, 0)) == 0
    first, second = recorded(slurm.folder)
    assert "--overwrite" in first and [word for word in first if word != "--overwrite"] == second


def test_a_node_with_gpus_trains_on_them_or_not_at_all(slurm: Slurm) -> None:
    for words, option in ((("fit",), "--trainer.accelerator"), (("predict",), "--accelerator"), (("prepare",), None)):
        more = {"ORGANSEG": recorder(slurm.folder, 0), "SLURM_GPUS_ON_NODE": "1"}
        assert slurm.submit(SCRIPT, *words, **more) == 0
        task = recorded(slurm.folder)[-1]
        assert task[-2:] == [option, "gpu"] if option else "gpu" not in task


def test_a_cancelled_job_does_not_come_back(slurm: Slurm) -> None:
    path = slurm.folder / "slow"
    path.write_text(f"#!/bin/bash\ntrap 'exit 75' TERM\ntouch {slurm.folder}/started\nsleep 60 & wait\n")
    path.chmod(0o755)
    process = slurm.start(SCRIPT, "fit", ORGANSEG=str(path))
    wait_for((slurm.folder / "started").exists)
    for pid in [*slurm.tasks(), int((slurm.state / "batch").read_text())]:  # whom scancel signals
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert not list((slurm.state / "requeued").iterdir())


def wait_for(condition: Callable[[], bool], within_s: float = 240.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def on_two_nodes(toy: Path, run: Path, *more: str) -> list[str]:
    words = command(toy, run, "--curriculum.rounds=1", "--trainer.strategy=ddp", *more)
    return [word for word in words if word not in TWO_RANKS]


@pytest.mark.slow
@pytest.mark.alone
def test_a_fit_on_two_nodes_that_is_requeued_ends_with_the_weights_of_one_that_is_not(
    toy: Path, two_nodes: Slurm, tmp_path: Path
) -> None:
    python = f"{sys.executable} -m organseg"
    whole, requeued = tmp_path / "whole", tmp_path / "requeued"
    organseg(*command(toy, whole, "--curriculum.rounds=1", *TWO_RANKS, "--data.init_args.workers=0"))

    words = on_two_nodes(toy, requeued, "--checkpoint_every_s=1000", "--data.init_args.workers=2")
    process = two_nodes.start("--nodes", 2, SCRIPT, *words, ORGANSEG=python)
    metrics = requeued / "metrics.csv"
    wait_for(lambda: metrics.exists() and "\n7,train/loss" in metrics.read_text())
    for pid in two_nodes.tasks():  # what --signal=USR1@300 does
        os.kill(pid, signal.SIGUSR1)
    process.communicate(timeout=400)
    assert process.returncode == 0, two_nodes.log
    (stop,) = set(re.findall(r"stopped by a signal; the same command goes on from step (\d+)", two_nodes.log))
    assert 7 < int(stop) < 50
    assert results(requeued) == results(whole)
    assert losses(requeued) == losses(whole)
    assert journal(requeued) == journal(whole)


@pytest.mark.faults
def test_a_cut_network_ends_both_nodes_with_6(toy: Path, two_nodes: Slurm, tmp_path: Path) -> None:
    words = on_two_nodes(toy, tmp_path / "run", "--rank_timeout_s=10", "--trainer.max_steps=2000")
    process = two_nodes.start("--nodes", 2, SCRIPT, *words, ORGANSEG=f"{sys.executable} -m organseg")
    metrics = tmp_path / "run" / "metrics.csv"
    wait_for(lambda: metrics.exists() and "\n7,train/loss" in metrics.read_text())
    ip("-n", (two_nodes.state / "nodes").read_text().split()[0], "link", "set", "eth0", "down")
    cut_at = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode == 6, two_nodes.log
    assert time.monotonic() - cut_at < 10 + 30
    assert "lost another rank" in two_nodes.log


@pytest.mark.slow
def test_the_doctor_says_whether_the_nodes_reach_each_other(two_nodes: Slurm) -> None:
    words = ("--nodes", 2, SCRIPT, "doctor")
    two_nodes.submit(*words, ORGANSEG=f"{sys.executable} -m organseg")
    assert re.search(r"^ok    2 tasks  +meet and sum up \(gloo\)$", two_nodes.log, flags=re.MULTILINE), two_nodes.log
    assert "WRONG 2 tasks" not in two_nodes.log
    node2 = (two_nodes.state / "nodes").read_text().split()[1]
    ip("-n", node2, "link", "set", "eth0", "down")
    assert two_nodes.submit(*words, ORGANSEG=f"{sys.executable} -m organseg") == 2
    for who in ("", r"task 1 on \S+: "):
        found = re.search(rf"^{who}WRONG 2 tasks .*\n.*GLOO_SOCKET_IFNAME", two_nodes.log, flags=re.MULTILINE)
        assert found, two_nodes.log
