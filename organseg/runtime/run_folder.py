"""The folder of a run: what it was started with, whether it is finished, and what a checkpoint must say of itself.

`run.json` holds the identity of the run (everything in its config and its data that its weights depend on). The same
`fit` on an unfinished folder goes on; on a finished one it says so; with another identity it refuses and shows the
difference (DESIGN.md 4).
"""

import fcntl
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from organseg import __version__
from organseg.batch import Describable
from organseg.checkpoints import verify_checkpoint
from organseg.errors import IntegrityError, StorageError, UsageError
from organseg.files import publish_text, reap_stale

_OWN = ("run.json", "config.yaml", "metrics.csv", "checkpoints", "test", "report", "pseudo_labels", "prior",
        "journal.jsonl", "wandb", "wandb_id", "wandb_stopped", "[0-9][0-9]_round*")  # fmt: skip
"""What organseg writes into a run folder: `--overwrite` removes these and nothing else."""

DATA = "data content"
"""The key of the data's hash in a run's identity."""

_FREE = {
    "trainer": ("accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "default_root_dir",
                "profiler", "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "val_check_interval",
                "check_val_every_n_epoch", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
                "num_sanity_val_steps", "enable_checkpointing", "barebones", "detect_anomaly", "benchmark",
                "use_distributed_sampler", "plugins"),
    "data": ("workers", "cache", "stage"),
}  # fmt: skip
"""Options that change where and how a run computes, not what."""

_NETWORKS = ("model.init_args", "model.init_args.network.init_args", "model.init_args.coarse_network.init_args")

LATER = (
    "data.test_datasets",
    "data.draw_annotated_only",
    "model.init_args.cross_fitted",
    "model.init_args.placed_by_others",
    *(f"{network}.qk_norm" for network in _NETWORKS),
)
"""Options that came later, left out where they are not used: a run without them is the run that it was before."""

_OF_OTHER_RUNS = ("model.init_args.coarse", "model.init_args.prior")
"""Checkpoints of other runs, which may lie elsewhere later."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that decides the weights, as `dotted.key: value`."""
    parts = {
        "seed": config["seed"],
        "model": config["model"],
        "trainer": {key: value for key, value in config["trainer"].items() if key not in _FREE["trainer"]},
        "data": {
            "class_path": config["data"]["class_path"],
            **{key: value for key, value in config["data"]["init_args"].items() if key not in _FREE["data"]},
        },
    }
    if config.get("curriculum"):
        parts["curriculum"] = {key: value for key, value in config["curriculum"].items() if key != "round0"}
    return {key: value for key, value in _flat("", parts) if value or key not in LATER}


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in _flat(f"{prefix}.{key}".lstrip("."), item)]
    return [(prefix, value)]


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ; not those of checkpoints of other runs, where both name one."""
    return [
        key
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key) and not (key in _OF_OTHER_RUNS and found.get(key) and wanted.get(key))
    ]


@dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where `last.ckpt` lies."""
        return self.path / "checkpoints"

    def record(self) -> dict[str, Any] | None:
        """What `run.json` says; None where there is no run yet.

        Raises:
            UsageError: If the folder holds something else.
            IntegrityError: If the record cannot be read.
        """
        file = self.path / "run.json"
        if not file.exists():
            # Hidden files are the lock, and what a start that was killed left behind.
            entries = list(self.path.iterdir()) if self.path.is_dir() else []
            foreign = [entry.name for entry in entries if not entry.name.startswith(".")]
            if foreign:
                found = ", ".join(sorted(foreign)[:3])
                raise UsageError(f"{self.path}: holds {found}, but no run; choose another --out")
            return None
        try:
            record: dict[str, Any] = json.loads(file.read_text())
            return record
        except ValueError as error:
            raise IntegrityError(f"{file}: not readable ({error}); start anew with --overwrite") from error

    def lock(self) -> BinaryIO:
        """Hold the folder until the returned file is closed or this process dies, however it dies.

        A record lock: unlike `flock`, loader workers that outlive a killed run for a moment do not inherit it.

        Raises:
            UsageError: If another `fit` holds it.
            StorageError: If the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("ab")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}; choose another --out") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise UsageError(
                f"{self.path}: another `fit` is at work here; wait for it, or choose another --out"
            ) from error
        except OSError as error:
            print(f"organseg: warning: {self.path}: no lock on this file system ({error.strerror}): see to it that no "
                  "other `fit` works here", file=sys.stderr)  # fmt: skip
        return file

    def compare(self, record: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Refuse to continue a run as another one.

        Raises:
            IntegrityError: With every difference.
        """
        found = record["identity"]
        differences = [
            f"{key}: run has {found.get(key, 'nothing')}, asked for {wanted.get(key, 'nothing')}"
            for key in (*differing(found, wanted), *self._other_files(found, wanted))
        ]
        if differences:
            raise IntegrityError(
                f"{self.path}: an existing run with another setup; choose another --out or --overwrite\n  "
                + "\n  ".join(differences)
            )

    def _other_files(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
        """Which checkpoints of other runs, given by another path now, are not those that this run began with."""
        note = self.path / "prior" / "made_of.json"
        moved = [key for key in _OF_OTHER_RUNS if found.get(key) and wanted.get(key) not in (None, found[key])]
        there = [key for key in moved if Path(wanted[key]).exists()]
        if not there or not note.exists():
            return []
        try:
            began = dict(json.loads(note.read_text()))
        except (ValueError, TypeError) as error:
            raise IntegrityError(
                f"{note}: found no JSON of names and sha256, by which moved checkpoints are known: put them back to "
                f"{', '.join(str(found[key]) for key in there)}, or start anew with --overwrite"
            ) from error
        names = {key: key.rpartition(".")[2] for key in there}
        return [key for key, name in names.items() if verify_checkpoint(Path(wanted[key])) != began.get(name)]

    def paths_at_start(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Where the checkpoints of other runs lay when a curriculum began: its journal hangs on what was said then."""
        begun = any(self.path.glob("[0-9][0-9]_round*/checkpoints/*.ckpt"))
        return {key: record["identity"][key] for key in _OF_OTHER_RUNS if begun and key in record["identity"]}

    def write(self, wanted: Mapping[str, Any], finished: bool) -> None:
        """Publish `run.json`."""
        self.path.mkdir(parents=True, exist_ok=True)
        document = {"organseg": __version__, "torch": torch.__version__, "finished": finished, "identity": wanted}
        publish_text(self.path / "run.json", json.dumps(document, indent=1))

    def clear(self) -> None:
        """Remove what organseg wrote, for `--overwrite`."""
        for entry in [entry for name in _OWN for entry in self.path.glob(name)]:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """JSON's view of a value: what is written is what will be read and compared."""
    return json.loads(json.dumps(value, default=str))


class RunRecord(Callback):
    """Writes the run folder's records, and into each checkpoint what prediction needs.

    Args:
        run: The folder.
        config: The whole config, plain values.
        wanted: The run's identity.
        overwrite: Remove an older run first.
    """

    def __init__(self, run: RunFolder, config: dict[str, Any], wanted: dict[str, Any], overwrite: bool) -> None:
        self.run = run
        self.config = config
        self.wanted = wanted
        self.overwrite = overwrite

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Publish the config before the first step; all ranks have read the folder by now."""
        if stage not in ("fit", "predict"):
            return
        trainer.strategy.barrier("run folder was read")
        if trainer.is_global_zero:
            if self.overwrite:
                self.run.clear()
                self.overwrite = False  # once: a curriculum's later phases must find what the earlier ones made
            self.run.write(self.wanted, finished=False)
            for folder in {file.parent for file in self.run.path.rglob(".*.tmp")}:
                reap_stale(folder)
            text = yaml.safe_dump(plain(self.config), sort_keys=False)  # a copy: shared parts would become aliases
            publish_text(self.run.path / "config.yaml", text)
        trainer.strategy.barrier("run folder is ready")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what network this is, of which organs, and what a scan goes through before it."""
        if not isinstance(pl_module, Describable):
            return  # a helper of the training, which predicts nothing
        checkpoint["organseg"] = plain(
            {
                "version": __version__,
                "model": self.config["model"],
                "identity": self.wanted,
                **pl_module.describe(),
            }
        )
