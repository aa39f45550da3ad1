"""The image's lock says what constraints.txt says, by hash, and its Dockerfile copies what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def pinned(path: Path) -> dict[str, str]:
    """Package -> version."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_lock_has_the_versions_that_are_tested() -> None:
    lock, tested = pinned(ROOT / "requirements.lock"), pinned(ROOT / "constraints.txt")
    assert {name: version for name, version in lock.items() if name != "setuptools"}.items() <= tested.items()
    assert "torch" not in lock and lock["lightning"] == tested["lightning"]


def test_every_package_is_locked_by_its_hash() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 40
    assert all(re.fullmatch(r"[a-z0-9_.-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_what_the_image_copies_is_not_ignored() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    allowed = (ROOT / ".dockerignore").read_text()
    for name in " ".join(copied).split():
        assert (ROOT / name).exists() and f"\n!{name}\n" in allowed, name
