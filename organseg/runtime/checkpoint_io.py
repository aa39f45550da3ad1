"""Checkpoint files that are wholly old or wholly new, and never believed without their hash (FAULTS.md 5).

Beside `last.ckpt` lies `last.ckpt.sha256`, a list of the contents that may lie under that name. The new hash joins the
list before the new file takes the name, so that a kill between the two never makes a good file look damaged.
"""

import hashlib
import io
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from organseg.checkpoints import hash_file, listed, load_checkpoint, verify_checkpoint
from organseg.errors import IntegrityError
from organseg.files import publish, publish_link, publish_text, sha256_of


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, keeps the one before as `previous.ckpt`, verifies on load."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Publish a checkpoint that is known to load again."""
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a verified checkpoint; plain values and tensors only, whatever `weights_only` says."""
        return load_checkpoint(Path(path), map_location or "cpu")


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Publish a checkpoint; the file under that name before becomes `previous.ckpt`.

    Raises:
        StorageError: If it cannot be written; what lay there is intact.
        IntegrityError: If it holds what would not load again.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    content = buffer.getbuffer()
    try:
        torch.load(io.BytesIO(content), map_location="meta", weights_only=True)
    except Exception as error:
        raise IntegrityError(f"{path}: the checkpoint would not load again ({error}); not written") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(content).hexdigest()
    current = sha256_of(path) if path.exists() else ""
    if current and current in listed(path):
        previous = path.with_name("previous.ckpt")
        _publish_list(previous, [current, *listed(previous)[:1]])
        publish_link(path, previous)
        _publish_list(previous, [current])
    _publish_list(path, [digest, current] if current else [digest])

    def write(file: BinaryIO) -> None:
        file.write(content)

    publish(path, write)


def publish_copy(source: Path, target: Path) -> None:
    """Publish a verified checkpoint under another name, with its hash.

    Raises:
        IntegrityError: If the source is damaged.
        StorageError: If it cannot be written.
    """
    digest = verify_checkpoint(source)
    content = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    _publish_list(target, [digest, *listed(target)[:1]])

    def write(file: BinaryIO) -> None:
        file.write(content)

    publish(target, write)
    _publish_list(target, [digest])


def _publish_list(path: Path, digests: list[str]) -> None:
    publish_text(hash_file(path), "".join(f"{digest}\n" for digest in digests))


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint of a run, and what was wrong with newer ones."""
    problems: list[str] = []
    for name in ("last.ckpt", "previous.ckpt"):
        path = folder / name
        if path.exists():
            try:
                verify_checkpoint(path)
                return path, problems
            except IntegrityError as error:
                problems.append(str(error))
    return None, problems
