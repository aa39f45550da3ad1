"""Write requirements.lock: every package of the image with its version and the sha256 of its archives.

All but torch, which the base image or a build argument supplies, and what only torch needs. Versions are those of
constraints.txt; hashes are of the wheels that pip would take for the Pythons that base images have. Run it on the
image's platform (Linux, x86_64) after constraints.txt changed: `python tools/lock.py`.
"""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
PYTHONS = ("3.11", "3.12")
"""python:3.11-slim, and PyTorch's images since torch 2.10."""
FROM_TORCH = {"torch", "triton", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"}
"""torch and what came into constraints.txt by it alone."""
HEAD = "# Made by tools/lock.py. torch is not here: the base image or the build argument TORCH supplies it.\n"


def report(python: str) -> list[dict[str, object]]:
    """What pip would install for organseg with W&B and TensorBoard on a version of Python, and from where."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        wanted = (f"{ROOT}[wandb,tensorboard]", "setuptools>=77")
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
                 "--python-version", python, "--only-binary=:all:", "--target", folder, "--report", str(path),
                 "-c", str(ROOT / "constraints.txt"), *wanted]  # fmt: skip
        subprocess.run(words, check=True, cwd=ROOT)
        packages: list[dict[str, object]] = json.loads(path.read_text())["install"]
        return packages


def pinned(package: dict) -> tuple[str, str] | None:  # type: ignore[type-arg]  # pip's own document
    """Name and version of one package, and its hash; None where the image has it otherwise."""
    name, version = package["metadata"]["name"].lower(), package["metadata"]["version"]
    if name == "organseg" or name in FROM_TORCH or name.startswith(("nvidia", "cuda")):
        return None
    return f"{name}=={version.partition('+')[0]}", package["download_info"]["archive_info"]["hashes"]["sha256"]


def main() -> None:
    """Write the file."""
    hashes: dict[str, set[str]] = defaultdict(set)
    for python in PYTHONS:
        for name, digest in filter(None, map(pinned, report(python))):
            hashes[name].add(digest)
    lines = [" ".join((name, *(f"--hash=sha256:{digest}" for digest in sorted(hashes[name])))) for name in hashes]
    LOCK.write_text(HEAD + "".join(f"{line}\n" for line in sorted(lines)))
    print(f"{LOCK.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
