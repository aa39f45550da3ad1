"""Which checkpoint may be tested with which config, and whose result that is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from organseg.checkpoints import listed, load_checkpoint
from organseg.errors import IntegrityError, UsageError
from organseg.runtime.run_folder import DATA, LATER, RunFolder, differing

_DATA = (
    "data.datasets", "data.test_datasets", "data.organs", "data.fold", "data.folds", "data.fold_seed", "data.val_share",
    "data.label_share", "data.seed", "data.window_hu",
)  # fmt: skip
"""Options that decide which patients a network has seen, and how."""

TESTED = "checkpoint.sha256"
"""Beside a test's tables: the sha256 of the checkpoint that they are of."""

_PLACING = ("model.init_args.position", "model.init_args.placed_by_others")
_NOT_THE_NETWORK = ("model.init_args.optimizer", "model.init_args.lr_decay", *_PLACING)
"""Options of a method that a test may change: of its training, or where the organs of a test case are taken to be."""


def run_of(checkpoint: str | None) -> RunFolder | None:
    """The run in whose folder a checkpoint lies, wherever that is now; None where it lies elsewhere."""
    folder = Path(checkpoint).resolve().parent.parent if checkpoint else None
    return RunFolder(folder) if folder and (folder / "run.json").exists() else None


def refuse_other_run(checkpoint: Path, wanted: Mapping[str, Any], content_hash: str) -> None:
    """Refuse to evaluate a network of another config, or on patients whom it may know.

    Args:
        checkpoint: Its file.
        wanted: The identity that the config asks for.
        content_hash: Of the data, with their split, as the cache holds them now.

    Raises:
        IntegrityError: With every difference.
    """
    record = load_checkpoint(checkpoint).get("organseg")
    if not isinstance(record, dict):
        raise IntegrityError(f"{checkpoint}: not a checkpoint of organseg; train one with `organseg fit`")
    found = record["identity"]
    method = [
        key
        for key in dict.fromkeys((*wanted, *LATER))
        if key.startswith("model.") and not key.startswith(_NOT_THE_NETWORK)
    ]
    differences = [
        f"{key}: trained with {found.get(key)}, asked for {wanted.get(key)}"
        for key in differing(found, wanted)
        if key in method or key in _DATA
    ]
    if differences:
        raise IntegrityError(f"{checkpoint}: does not belong to this config\n  " + "\n  ".join(differences))
    if found.get(DATA) != content_hash:
        raise IntegrityError(
            f"{checkpoint}: trained on other data than the cache holds now: cases were added, removed or prepared "
            "otherwise, so that patients whom it knows may be among those to be tested; prepare what it was trained on "
            "into a cache of its own (--data.init_args.cache), or segment new scans with `organseg predict`"
        )


def written(folder: Path) -> int | None:
    """When a test's tables were last written, in ns; None where there are none."""
    path = folder / "summary.csv"
    return path.stat().st_mtime_ns if path.exists() else None


def is_tested(checkpoint: Path, folder: Path) -> bool:
    """Whether a folder has the tables of this checkpoint, as it is now."""
    try:
        found = (folder / TESTED).read_text().strip()
    except OSError:
        return False
    return (folder / "summary.csv").exists() and found == (listed(checkpoint) or [""])[0]


def refuse_no_result(checkpoint: Path, wanted: Mapping[str, Any], run: RunFolder) -> None:
    """Refuse to write into a run's folder what would be taken for its result.

    Args:
        checkpoint: What is tested.
        wanted: The identity that the config asks for.
        run: Where the tables would go.

    Raises:
        UsageError: If the checkpoint is not of that run, or organs are positioned otherwise than the run does.
    """
    record = run.record() if (run.path / "run.json").exists() else None
    if record is None:
        return
    if checkpoint.resolve() != (run.checkpoints / "last.ckpt").resolve():
        raise UsageError(f"{checkpoint}: no result of {run.path}: add --out, for a folder of its own")
    for key in _PLACING:
        asked = wanted.get(key, False)
        if record["identity"].get(key, False) != asked:
            raise UsageError(f"{key}: {asked} is no result of {run.path}: add --out")
