"""A toy cohort, prepared once for all tests that run the real command; and hypothesis, the same in every run."""

import os
import subprocess
import sys
from pathlib import Path

# As `make test` does: sums in another order, of another number of threads, are other bytes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from toy import organseg

# The same examples in every run: a test that fails once in a while teaches people to run it again.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

FUSION = Path(__file__).parents[1] / "tools" / "fusion.py"


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with phantoms, no two alike.

    `cache` holds the data sets `phantom`, `btcv`, `chaosmr` and `mirrored`; `fusion_cache` holds what tools/fusion.py
    makes of `btcv`.
    """
    folder = tmp_path_factory.mktemp("toy")
    organseg("phantom", "--cases", 6, "--shape", 24, 32, 32, "--out", folder / "phantoms", "--processes", 1)
    renamed = []
    for seed, name, cases in ((1, "btcv", 5), (2, "chaosmr", 3)):
        organseg("phantom", "--cases", cases, "--seed", seed, "--shape", 24, 32, 32, "--out", folder / name,
                 "--processes", 1)  # fmt: skip
        renamed.append(folder / name / "dataset.yaml")
        renamed[-1].write_text(renamed[-1].read_text().replace("name: phantom", f"name: {name}"))
    organseg("phantom", "--mirrored", "--cases", 5, "--shape", 16, 32, 32, "--out", folder / "mirrored")
    manifests = (folder / "phantoms" / "dataset.yaml", *renamed, folder / "mirrored" / "dataset.yaml")
    organseg("prepare", *manifests, "--out", folder / "cache", "--processes", 1)
    words = [sys.executable, FUSION, renamed[0], "--out", folder / "fusion", "--cases", 2]
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
    manifests = tuple(folder / "fusion" / f"{part}.yaml" for part in ("few", "pancreas", "heldout"))
    organseg("prepare", *manifests, "--out", folder / "fusion_cache", "--processes", 1)
    return folder


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first in both halves, one half a process; those of a module stay together."""
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            modules.setdefault(item.nodeid.split("::")[0], []).append(item)
    halves: tuple[list[pytest.Item], list[pytest.Item]] = ([], [])
    for tests in sorted(modules.values(), key=len, reverse=True):
        min(halves, key=len).extend(tests)
    fast = [item for item in items if not item.get_closest_marker("slow")]
    first = max(len(items) // 2 - len(halves[0]), 0)
    items[:] = [*halves[0], *fast[:first], *halves[1], *fast[first:]]
