"""`organseg doctor`: what this machine has, and what would go wrong on it, with the remedy."""

import importlib.metadata
import locale
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from organseg import __version__
from organseg.data.cohort import read_index
from organseg.errors import OrgansegError
from organseg.processes import usable_cores

GB = 2**30
PACKAGES = ("torch", "lightning", "torchmetrics", "numpy", "scipy", "nibabel", "h5py", "hdf5plugin", "albumentations",
            "jsonargparse")  # fmt: skip
OPTIONAL = ("wandb", "tensorboard")
REFUSED = {"lightning": {"2.6.2", "2.6.3"}}
"""Releases that must not be installed: their archives were tampered with."""
LEAST_SHM = 1 * GB
LEAST_FREE = 5 * GB
LEAST_FILES = 1024
RANKS_TIMEOUT_S = 60

_RANK = """
import sys, datetime, torch, torch.distributed as dist
rank, ranks, store, backend, device = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks,
                        timeout=datetime.timedelta(seconds=30))
total = torch.ones(1, device=device) * (rank + 1)
dist.all_reduce(total)
dist.destroy_process_group()
sys.exit(0 if total.item() == ranks * (ranks + 1) // 2 else 1)
"""


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        what: Was looked at.
        found: There.
        remedy: What to do, where something would go wrong; else "".
    """

    what: str
    found: str
    remedy: str = ""


def doctor(arguments: Namespace) -> int:
    """Look, and tell; 2 if something would go wrong. Of a job's tasks the first tells all, the others what is wrong."""
    findings = []
    task = int(os.environ.get("SLURM_PROCID", "0"))
    for finding in examine(arguments):
        findings.append(finding)
        if task and not finding.remedy:
            continue
        where = f"task {task} on {socket.gethostname()}: " if task else ""
        print(f"{where}{'WRONG' if finding.remedy else 'ok':<6}{finding.what:<22}{finding.found}", flush=True)
        if finding.remedy:
            print(f"{'':<6}{'':<22}-> {finding.remedy}")
    wrong = sum(bool(finding.remedy) for finding in findings)
    if task:
        return 2 if wrong else 0
    print(f"\n{wrong} of {len(findings)} would go wrong" if wrong else "\nnothing that would go wrong was found")
    return 2 if wrong else 0


def examine(arguments: Namespace) -> Iterator[Finding]:
    """Everything that is looked at, one after another."""
    yield Finding("organseg", f"{__version__}, Python {sys.version.split()[0]}")
    yield from versions()
    yield from processors()
    yield from memory()
    yield from limits()
    yield from environment()
    yield from disks([Path.cwd(), Path(tempfile.gettempdir()), *map(Path, arguments.out)])
    for cache in arguments.cache:
        yield from prepared(Path(cache))
    if not arguments.quick:
        yield two_ranks()
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and os.environ.get("MASTER_ADDR"):
            yield from tasks()


def versions() -> Iterator[Finding]:
    """What is installed."""
    for name in (*PACKAGES, *OPTIONAL):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed", "" if name in OPTIONAL else "pip install -c constraints.txt .")
            continue
        refused = version in REFUSED.get(name, ())
        yield Finding(name, version, f"a tampered release: pip uninstall {name}; take another" if refused else "")


def processors() -> Iterator[Finding]:
    """CPUs and GPUs."""
    import torch

    from organseg.runtime.precision import bf16_in_hardware, old_gpu

    bf16 = "bfloat16" if bf16_in_hardware() else "no bfloat16, so trainings on it compute in 32-true"
    yield Finding("CPU", f"{usable_cores()} of {os.cpu_count()} cores, {bf16}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = ""
        if shutil.which("nvidia-smi") and visible != "":
            hint = "a driver is there: install a torch build for CUDA" if not built else "check the driver's version"
        yield Finding("GPU", f"none that torch {torch.__version__} can use", hint)
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        bf16 = ", no bfloat16, so trainings compute in 32-true" if old_gpu() else ""
        yield Finding(f"GPU {number}", f"{device.name}, {device.total_memory / GB:.0f} GB{bf16}")
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    several = torch.cuda.device_count() > 1
    yield Finding("NCCL", "available" if nccl else "not in this torch", "" if nccl or not several else
                  "install a torch build with NCCL, or train with --trainer.strategy ddp on gloo")  # fmt: skip


def memory() -> Iterator[Finding]:
    """Main memory, and the shared memory that loader workers pass batches through."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_limit()
    yield Finding("memory", f"{min(total, limit) / GB:.0f} GB" + (" (limit of this container)" * (limit < total)))
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        yield Finding("shared memory", f"{free / GB:.1f} GB free in {shm}", "" if free >= LEAST_SHM else
                      "loader workers die of a bus error: docker run --shm-size=8g, in Kubernetes an emptyDir with "
                      "medium Memory at /dev/shm, or --data.init_args.workers 0")  # fmt: skip


def _cgroup_limit() -> float:
    """Bytes that the container may take."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return float(Path(path).read_text())
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return float("inf")


def limits() -> Iterator[Finding]:
    """Of this process."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding("open files", str(files), "" if files >= LEAST_FILES else f"ulimit -n {LEAST_FILES} or more")


def environment() -> Iterator[Finding]:
    """Variables and settings that have surprised people. Values that may be secret are not shown."""
    import torch

    encoding = locale.getpreferredencoding(False).upper()
    fine = encoding in ("UTF-8", "UTF8")
    yield Finding("encoding", encoding, "" if fine else "names of files may not be readable: export LC_ALL=C.UTF-8")
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        yield Finding("TORCH_FORCE_NO_...", "set", "it lets checkpoints run code, so that none is loaded: unset it")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads:
        slow = threads == "1" and usable_cores() > 1 and not torch.cuda.is_available()
        yield Finding("OMP_NUM_THREADS", threads, "a training on CPU uses one core: unset it" * slow)
    yield Finding("W&B key", "set" if os.environ.get("WANDB_API_KEY") else "not set (WANDB_API_KEY, or `wandb login`)")
    home = Path.home()
    writable = os.access(home, os.W_OK)
    redirected = all(os.environ.get(name) for name in ("MPLCONFIGDIR", "WANDB_DIR"))
    yield Finding("home", f"{home}, {'writable' if writable else 'read-only'}", "" if writable or redirected else
                  "set MPLCONFIGDIR and WANDB_DIR to a writable folder")  # fmt: skip
    name = socket.gethostname()
    try:
        yield Finding("host name", f"resolves to {socket.gethostbyname(name)}")
    except OSError:
        yield Finding("host name", "does not resolve", "ranks cannot meet: add it to /etc/hosts, or set "
                      "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network's interface")  # fmt: skip
    master = os.environ.get("MASTER_ADDR")
    if master:
        yield _reachable(master)


def _reachable(master: str) -> Finding:
    """Whether the launcher's meeting point has an address."""
    try:
        address = socket.getaddrinfo(master, None)[0][4][0]
    except OSError as error:
        return Finding("MASTER_ADDR", f"no address ({error.strerror})", "check the launcher: SLURM's first node, or "
                       "the headless service of the Kubernetes job")  # fmt: skip
    return Finding("MASTER_ADDR", f"resolves to {address}")


def disks(folders: list[Path]) -> Iterator[Finding]:
    """Room and rights where something will be written."""
    for folder in dict.fromkeys(folders):
        there = folder
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        remedy = ""
        if not os.access(there, os.W_OK):
            remedy = "cannot be written: choose another folder, or mount it writable"
        elif free < LEAST_FREE:
            remedy = "a run of some gigabytes may not fit: free some, or choose another folder (TMPDIR, --out)"
        yield Finding("disk", f"{folder}: {free / GB:.0f} GB free", remedy)


def prepared(cache: Path) -> Iterator[Finding]:
    """What a cache holds."""
    folders = sorted(path.parent for path in cache.glob("*/index.json"))
    if not folders:
        yield Finding("cache", f"{cache}: no prepared data set", f"organseg prepare DATASET.yaml --out {cache}")
    for folder in folders:
        try:
            yield Finding("cache", f"{folder}: {len(read_index(folder))} cases")
        except OrgansegError as error:
            yield Finding("cache", str(folder), str(error))


def two_ranks() -> Finding:
    """Whether two processes of this machine can add up numbers."""
    with tempfile.TemporaryDirectory() as folder:
        why = _meet([0, 1], 2, f"file://{folder}/store", "gloo", "cpu")
    if not why:
        return Finding("two ranks", "meet and sum up (gloo)")
    return Finding("two ranks", why, "set GLOO_SOCKET_IFNAME to an interface that is up, for example lo or eth0")


def tasks() -> Iterator[Finding]:
    """Whether all tasks of this job can, over the network between its nodes; each of them runs this."""
    import torch

    rank, ranks, local = (int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    kinds = [("gloo", "cpu", "GLOO_SOCKET_IFNAME")]
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        kinds.append(("nccl", f"cuda:{local}", "NCCL_SOCKET_IFNAME"))
    for number, (backend, device, variable) in enumerate(kinds):
        why = _meet([rank], ranks, f"tcp://{os.environ['MASTER_ADDR']}:{port + number}", backend, device)
        remedy = f"set {variable} to the interface of the network between the nodes, and look at its firewall"
        yield Finding(f"{ranks} tasks", why or f"meet and sum up ({backend})", remedy if why else "")


def _meet(numbers: Sequence[int], ranks: int, store: str, backend: str, device: str) -> str:
    """Start these ranks of a sum; returns what went wrong."""
    words = [f"{ranks}", store, backend, device]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, f"{number}", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for number in numbers
    ]
    said = ""
    try:
        said = "".join(rank.communicate(timeout=RANKS_TIMEOUT_S)[1].decode(errors="replace") for rank in started)
    except subprocess.TimeoutExpired:
        said = f"no answer within {RANKS_TIMEOUT_S} s"
    finally:
        for rank in started:
            rank.kill()
            rank.wait()
    if all(rank.returncode == 0 for rank in started):
        return ""
    return said.strip().splitlines()[-1][:120] if said.strip() else "failed"
