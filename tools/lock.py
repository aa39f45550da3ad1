"""Write requirements.lock: every package of the image with its version and the sha256 of its archives.

All but torch, which the base image or a build argument supplies, and what only torch needs. Versions are those of
constraints.txt; hashes are of the archives that pip would take here, so run it on the image's platform and Python
(Linux, x86_64, CPython 3.11), after constraints.txt changed: `python tools/lock.py`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
FROM_TORCH = {"torch", "triton", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"}
"""torch and what came into constraints.txt by it alone."""
HEAD = "# Made by tools/lock.py. torch is not here: the base image or the build argument TORCH supplies it.\n"


def report() -> list[dict[str, object]]:
    """What pip would install for organseg with W&B, and from where."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        wanted = (f"{ROOT}[wandb,tensorboard]", "setuptools>=77")
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report",
                 str(path), "-c", str(ROOT / "constraints.txt"), *wanted]  # fmt: skip
        subprocess.run(words, check=True, cwd=ROOT)
        packages: list[dict[str, object]] = json.loads(path.read_text())["install"]
        return packages


def line(package: dict) -> str | None:  # type: ignore[type-arg]  # pip's own document
    """Of one package; None where the image has it otherwise."""
    name, version = package["metadata"]["name"].lower(), package["metadata"]["version"]
    if name == "organseg" or name in FROM_TORCH or name.startswith("nvidia"):
        return None
    hashes = package["download_info"]["archive_info"]["hashes"]
    return f"{name}=={version.partition('+')[0]} --hash=sha256:{hashes['sha256']}\n"


def main() -> None:
    """Write the file."""
    lines = sorted(filter(None, map(line, report())))
    LOCK.write_text(HEAD + "".join(lines))
    print(f"{LOCK.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
