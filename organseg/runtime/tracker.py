"""`WandbTracker`: a run on Weights & Biases that survives kills and gives nobody's name away (FAULTS.md 6 and 9).

Once. A killed run goes back to its last checkpoint and logs some steps again, and W&B writes in intervals, so that
neither `metrics.csv` nor this process knows what an earlier part of the run has left behind: its `.wandb` files do.
They are read at the start (LevelDB's log format), or, online, the server says at which step it stands. The first number
of a resumed run then adds what `metrics.csv` holds below its step and W&B does not, and nothing is logged at a step
that its metric has already reached. A step is sent when the next one comes, whole: the server goes on behind the last
step that it has, and a validation comes after its step's loss. So W&B has each number of `metrics.csv` once, also where
the recorder died with the run. A step that was computed again keeps its first value.

Identity. W&B notes host, user, command line, paths and packages by default, also offline; none of that is written
unless asked for. Of the config only hyper-parameters are sent, by the names of their options.

W&B never stops a training: its first failure is said once, and the run goes on without it; where the server does not
answer at the start, the run is recorded offline instead.

Not Lightning's `WandbLogger`: each of its methods would be replaced.
"""

import contextlib
import logging
import math
import os
import re
import secrets
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from organseg.errors import OrgansegError, UsageError
from organseg.files import publish_text
from organseg.processes import STOP
from organseg.runtime.metrics_log import read_metrics

STOPPED = "wandb_stopped"
"""File of a run folder: W&B has ended the run early, and nobody shall resume it."""

_PATIENCE_S = 20.0
"""For W&B's server, at the start and at the end; a job that was asked to stop has half a minute."""

_ANONYMOUS = {
    "host": "-", "program": "-", "x_executable": "-", "email": "", "username": "",
    "x_disable_meta": True, "x_disable_machine_info": True, "x_disable_stats": True, "x_disable_viewer": True,
    "x_save_requirements": False, "disable_git": True, "disable_code": True, "disable_job_creation": True,
    "save_code": False, "label_disable": True,
}  # fmt: skip
"""W&B's settings that keep host, user, command line, paths, packages and source to ourselves."""

_HYPERPARAMETERS = re.compile(
    r"seed|model\..+|curriculum\..+|trainer\.(max_steps|precision|accumulate_grad_batches|gradient_clip_\w+)"
    r"|data\.(class_path|datasets|organs|fold|folds|fold_seed|val_share|label_share|batch_size|window_hu|patch_size"
    r"|augmentation\..+)"
)
_WORD = re.compile(r"[\w.+-]{1,100}")  # no separator of folders


class WandbTracker(Logger):
    """Sends a run's numbers to W&B, or records them for `wandb sync`; only `fit` does, and only on rank 0.

    The run's id lies in `RUN/wandb_id`, W&B's files in `RUN/wandb/`. The key comes from WANDB_API_KEY or `wandb login`.
    WANDB_MODE wins over `offline`; inside a sweep the agent says project, entity and id.

    Args:
        project: W&B's project.
        entity: W&B's user or team; null is the key's own.
        name: Of the run; null lets W&B choose.
        group: Of runs that belong together.
        tags: Of the run.
        offline: Record only; `wandb sync RUN/wandb` sends it later.
        images: Also a table of each validation case's DSC, and pictures of a few.
        checkpoints: Also the final checkpoint, as an artifact.
        keep_identity: Let W&B note host, user, command line, paths and packages.
    """

    def __init__(
        self,
        project: str = "organseg",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        offline: bool = True,
        images: bool = False,
        checkpoints: bool = False,
        keep_identity: bool = False,
    ) -> None:
        super().__init__()
        self.images = images
        self._project, self._entity, self._name, self._group, self._tags = project, entity, name, group, tuple(tags)
        self._mode = os.environ.get("WANDB_MODE", "offline" if offline else "online")
        self._checkpoints = checkpoints
        self._keep_identity = keep_identity
        self._folder: Path | None = None
        self._config: dict[str, Any] = {}
        self._run: Any = None
        self._failed = False
        self._reached: dict[str, int] = {}
        self._floor = -1
        self._held: tuple[int, dict[str, Any]] = (-1, {})

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str:
        """The run's id, once there is one."""
        return self._run.id if self._run is not None else ""

    def follow(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Track the run of a folder; without this, as in a test, nothing is logged.

        Raises:
            UsageError: If W&B is not installed.
        """
        if find_spec("wandb") is None:
            raise UsageError("trainer.logger: W&B is not installed; pip install 'organseg[wandb]'")
        if self._mode != "disabled":
            self._folder, self._config = folder, hyperparameters(identity)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """What modules would send is not sent; see `hyperparameters`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics of a step, those that W&B does not have yet."""
        at = step or 0
        numbers = {name: float(value) for name, value in metrics.items() if name != "epoch"}

        def log() -> None:
            self._begin(before=at)
            self._hold(numbers, at)

        self._attempt(log)

    @rank_zero_only
    def log_cases(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        pictures: Mapping[str, NDArray[np.uint8]],
        step: int,
    ) -> None:
        """Log the validation cases of a step: a table, and pictures [H, W, 3] by caption."""

        def log() -> None:
            import wandb

            self._begin(before=step)
            drawn = [wandb.Image(pixels, caption=caption) for caption, pixels in pictures.items()]
            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._hold({"val/cases": table, **({"val/pictures": drawn} if drawn else {})}, step)

        self._attempt(log)

    @rank_zero_only
    def finish(self, checkpoint: Path) -> None:
        """The run is done; `checkpoint` is its result."""

        def end() -> None:
            import wandb

            self._begin(before=None)
            self._hold({}, -1)
            if self._checkpoints:
                artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
                artifact.add_file(str(checkpoint.absolute()), policy="immutable", skip_cache=True)
                self._run.log_artifact(artifact)
            self._run.finish(exit_code=0)

        self._attempt(end)
        self._folder = None

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """A training of the run has ended; if it failed or was interrupted, the run ends as well, for now.

        Its last step is not sent: it may be half of one, and the next start adds it.
        """
        if status == "success" or self._run is None:
            return
        error = sys.exc_info()[1]
        code = error.exit_code if isinstance(error, OrgansegError) else 1
        self._attempt(lambda: self._run.finish(exit_code=code))
        self._folder = None

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do it if a run is tracked and W&B works; whatever W&B raises is said once and not again."""
        if self._folder is None or self._failed:
            return
        try:
            work()
        except Exception as error:
            self._failed = True
            self._warn(error, f"the run goes on without it; `wandb sync {self._folder}/wandb` may send what is missing")
            with contextlib.suppress(Exception):
                _let_go()

    def _warn(self, error: Exception, remedy: str) -> None:
        why = " ".join(str(error).split())[:200]
        print(f"organseg: warning: W&B: {type(error).__name__}: {why}; {remedy}", file=sys.stderr, flush=True)

    # Each number once.

    def _begin(self, before: int | None) -> None:
        """Start, and add the numbers below a step (None: all) that an earlier part of the run could not."""
        if self._run is not None:
            return
        assert self._folder is not None
        identifier = self._identifier()
        self._reached = reached(self._folder / "wandb", identifier)
        self._run = self._start(identifier)
        if not self._run.settings.mode.startswith("offline"):
            self._reached, self._floor = {}, self._run.starting_step - 1
        for step, name, value in read_metrics(self._folder / "metrics.csv"):
            if before is None or step < before:
                self._send({name: value}, step)

    def _hold(self, values: Mapping[str, Any], step: int) -> None:
        """Keep what belongs to a step, and send the one before."""
        before, known = self._held
        if step != before:
            self._send(known, before)
            known = {}
        self._held = (step, {**known, **values})

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        new = {name: value for name, value in values.items() if step > self._reached.get(name, self._floor)}
        if new:
            self._run.log(new, step=step)
            self._reached.update(dict.fromkeys(new, step))

    def _identifier(self) -> str:
        """The sweep's, or the one that the run was begun with, or a new one; kept in the run folder."""
        assert self._folder is not None
        file = self._folder / "wandb_id"
        kept = file.read_text().strip() if file.exists() else ""
        identifier = os.environ.get("WANDB_RUN_ID") or kept or secrets.token_hex(4)
        if identifier != kept:
            publish_text(file, identifier + "\n")
        return identifier

    # W&B's own.

    def _start(self, identifier: str) -> Any:
        """A run of W&B: online, or offline where that is wanted or nobody answers."""
        assert self._folder is not None
        place = self._folder.absolute()
        files = place / "wandb"
        for variable, folder in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
            os.environ.setdefault(variable, str(files / folder))  # what waits for `wandb sync` belongs to the run
        if not self._keep_identity:
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        if not self._keep_identity:
            logging.getLogger("wandb").setLevel(logging.CRITICAL + 1)  # it begins with the paths of its logs
        given: dict[str, Any] = {"dir": str(place), "project": self._project, "entity": self._entity, "id": identifier,
                                 "name": self._name, "group": self._group, "tags": self._tags or None,
                                 "config": self._config, "resume": "allow"}  # fmt: skip
        run = self._online(wandb, given) if self._mode in ("online", "run") else None
        run = run or wandb.init(**given, settings=self._settings(wandb, "offline"))
        if not self._keep_identity:
            for logs in (*files.glob("*run-*/logs"), files / "cache"):
                shutil.rmtree(logs, ignore_errors=True)
        return run

    def _online(self, wandb: Any, given: Mapping[str, Any]) -> Any:
        """A run on the server; None where there is no key or no answer."""
        try:
            if not wandb.login(prompt=False, verify=False):
                raise UsageError("no key; set WANDB_API_KEY or use `wandb login`")
            return wandb.init(**given, settings=self._settings(wandb, "online"))
        except Exception as error:
            self._warn(error, f"recorded offline instead; later: wandb sync {self._folder}/wandb")
            _let_go()
            return None

    def _settings(self, wandb: Any, mode: str) -> Any:
        return wandb.Settings(
            mode=mode,
            console="off",
            silent=True,
            symlink=False,
            use_dot_wandb=False,
            init_timeout=_PATIENCE_S,
            finish_timeout=_PATIENCE_S,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1.0,
            stop_fn=self._stop,
            **({} if self._keep_identity else _ANONYMOUS),
        )

    def _stop(self) -> None:
        """W&B ends the run: by hand, or because a sweep's other trials are better."""
        if self._folder is not None:  # else it has ended by itself
            publish_text(self._folder / STOPPED, "W&B ended this run early\n")
        if "WANDB_SWEEP_PARAM_PATH" not in os.environ:
            STOP.asked = True  # an agent sends SIGTERM, and a second request would end the process at once


def _let_go() -> None:
    """End W&B's own process: it would go on to hold the run's id, and complain when this one ends."""
    import wandb

    wandb.teardown(1)


def hyperparameters(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What W&B may know of a run's config: hyper-parameters by the names of their options, and no path."""
    return {
        re.sub(r"^data\.(?!class_path)", "data.init_args.", key): value
        for key, value in identity.items()
        if _HYPERPARAMETERS.fullmatch(key) and _is_harmless(value)
    }


def _is_harmless(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_harmless, value))
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def reached(folder: Path, identifier: str) -> dict[str, int]:
    """The last step of each metric that the `.wandb` files of a run hold, those of all its parts."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is imported

    steps: dict[str, int] = {}
    for file in folder.glob(f"*run-*/run-{identifier}.wandb"):
        for text in _records(file.read_bytes()):
            record = Record.FromString(text)
            for item in record.history.item:
                name = item.nested_key[0] if item.nested_key else item.key
                steps[name] = max(steps.get(name, -1), record.history.step.num)
    return steps


def _records(data: bytes) -> Iterator[bytes]:
    """The whole records of a W&B file: seven bytes, then LevelDB's log of chunks in blocks of 32 KiB."""
    place, record = 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, place)
        chunk = data[place + 7 : place + 7 + length]
        if len(chunk) < length or zlib.crc32(bytes([kind]) + chunk) != checksum:
            return  # torn by a kill
        record = record + chunk if kind in (3, 4) else chunk
        place += 7 + length
        if kind in (1, 4):
            yield record
