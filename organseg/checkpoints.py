"""Reading checkpoint files: never believed without their hash, never more than tensors and plain values (FAULTS.md 5).

`runtime/checkpoint_io.py` writes them, and with each a list of the contents that may lie under its name.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from organseg.errors import IntegrityError
from organseg.files import sha256_of


def hash_file(path: Path) -> Path:
    """Where the list of a checkpoint's contents lies."""
    return path.with_name(path.name + ".sha256")


def listed(path: Path) -> list[str]:
    """sha256 of each content that may lie under a checkpoint's name; empty where nobody keeps a list."""
    try:
        return hash_file(path).read_text().split()
    except OSError:
        return []


def verify_checkpoint(path: Path) -> str:
    """The sha256 of a checkpoint file, if it is undamaged.

    A file that was copied without its list is checked by the CRCs of its own records.

    Raises:
        IntegrityError: If it is missing or damaged.
    """
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise IntegrityError(f"{path}: no readable checkpoint ({error.strerror}); check the path") from error
    expected = listed(path)
    if expected and digest not in expected:
        raise IntegrityError(f"{path}: damaged: its sha256 is {digest}, expected {' or '.join(expected)}")
    if not expected:
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise IntegrityError(f"{path}: no checkpoint ({error})") from error
        if broken:
            raise IntegrityError(f"{path}: damaged: the record {broken} does not match its checksum")
    return digest


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a verified checkpoint: tensors and plain values, never code.

    Raises:
        IntegrityError: If it is damaged, or holds anything else.
    """
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        raise IntegrityError("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which lets checkpoints run code; unset it")
    verify_checkpoint(path)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise IntegrityError(f"{path}: holds more than tensors and plain values, refused ({error})") from error
    return checkpoint
