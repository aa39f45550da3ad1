"""`organseg doctor` sees what would go wrong, says what to do, and shows no secret."""

import argparse
import importlib.metadata
import locale
import os
import resource
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from synthetic import make_cache, write_dataset

from organseg.cli import doctor, run

Usage = namedtuple("Usage", "total used free")


def wrong(**options) -> dict[str, str]:
    """What would go wrong here -> its remedy."""
    arguments = argparse.Namespace(**{"cache": [], "out": [], "quick": True, **options})
    return {finding.what: finding.remedy for finding in doctor.examine(arguments) if finding.remedy}


@pytest.fixture(autouse=True)
def healthy(monkeypatch):
    """A machine on which nothing is wrong, whatever this one is."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * doctor.GB, 0, 100 * doctor.GB))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    monkeypatch.setattr(locale, "getpreferredencoding", lambda _: "UTF-8")
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.0.1")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    for name in ("OMP_NUM_THREADS", "MASTER_ADDR", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_a_healthy_machine(capsys):
    assert wrong() == {}
    assert run(["doctor", "--quick"]) == 0
    assert "nothing that would go wrong was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "name", "value", "what", "remedy"),
    [
        (shutil, "disk_usage", lambda path: Usage(1, 0, 64 * 2**20 if str(path) == "/dev/shm" else 2**40),
         "shared memory", "--shm-size"),
        (shutil, "disk_usage", lambda path: Usage(1, 0, 2**40 if str(path) == "/dev/shm" else 2**30),
         "disk", "free some"),
        (os, "access", lambda path, _: Path(path) == Path.home(), "disk", "cannot be written"),
        (os, "access", lambda path, _: Path(path) != Path.home(), "home", "MPLCONFIGDIR"),
        (resource, "getrlimit", lambda _: (256, 4096), "open files", "ulimit -n"),
        (locale, "getpreferredencoding", lambda _: "ANSI_X3.4-1968", "encoding", "C.UTF-8"),
        (shutil, "which", lambda _: "/usr/bin/nvidia-smi", "GPU", "CUDA"),
    ],
)  # fmt: skip
def test_what_would_go_wrong(monkeypatch, module, name, value, what, remedy):
    for variable in ("MPLCONFIGDIR", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(module, name, value)
    found = wrong()
    assert remedy in found.pop(what) and not found


@pytest.mark.parametrize(
    ("name", "value", "what", "remedy"),
    [
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1", "TORCH_FORCE_NO_...", "unset it"),
        ("MASTER_ADDR", "no-such-host.invalid", "MASTER_ADDR", "launcher"),
    ],
)
def test_variables(monkeypatch, name, value, what, remedy):
    monkeypatch.setenv(name, value)
    assert remedy in wrong()[what]


def test_a_host_without_an_address(monkeypatch):
    def fail(_):
        raise OSError("no address")

    monkeypatch.setattr(socket, "gethostbyname", fail)
    assert "GLOO_SOCKET_IFNAME" in wrong()["host name"]


def test_releases_that_must_not_be_there(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6.3" if name == "lightning" else "1.0")
    assert "tampered" in wrong()["lightning"]


def test_what_is_optional_may_be_missing(monkeypatch):
    def version(name):
        if name in ("wandb", "h5py"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert wrong() == {"h5py": "pip install -c constraints.txt ."}


def test_a_cache(tmp_path, capsys):
    cache = make_cache(write_dataset(tmp_path / "set", 2), tmp_path / "cache")
    assert wrong(cache=[cache]) == {}
    assert "organseg prepare" in wrong(cache=[tmp_path])["cache"]
    next((cache / "tiny").glob("*.h5")).write_bytes(b"")
    assert run(["doctor", "--quick", "--cache", str(cache)]) == 2
    assert "1 of " in capsys.readouterr().out


def test_no_secret_is_shown(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    run(["doctor", "--quick"])
    assert "0123456789abcdef" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_meet():
    assert not doctor.two_ranks().remedy


@pytest.mark.slow
def test_two_ranks_that_do_not_meet(monkeypatch):
    monkeypatch.setattr(doctor, "_RANK", "raise SystemExit('no way to the other')")
    found = doctor.two_ranks()
    assert found.found == "no way to the other" and "GLOO_SOCKET_IFNAME" in found.remedy


def test_one_thread_is_enough_beside_a_gpu(monkeypatch):
    """As torchrun sets it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(doctor, "usable_cores", lambda: 8)
    for there, remedy in ((True, ""), (False, "a training on CPU uses one core: unset it")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert {finding.what: finding.remedy for finding in doctor.environment()}["OMP_NUM_THREADS"] == remedy
