"""`fit`, `validate` and `test`: Lightning's command line, with a run folder around it.

The data module is instantiated first and tells the method its organs, so that nobody writes a number of channels.
"""

import contextlib
import copy
import difflib
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Its import would ask the network for newer releases; it must be set before anything imports it.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from organseg import __version__
from organseg.checkpoints import verify_checkpoint
from organseg.cli.causes import known_cause
from organseg.cli.configs import expand
from organseg.cli.initial import begin_with
from organseg.cli.modules import build_module, check_curriculum, explained, trust
from organseg.cli.tested import TESTED, refuse_no_result, refuse_other_run, run_of, written
from organseg.curriculum import Curriculum
from organseg.data.coverage import coverage
from organseg.data.shards import CaseResults, Shard
from organseg.errors import IntegrityError, UsageError
from organseg.files import publish_text
from organseg.methods.base import SegmentationModule
from organseg.processes import STOP, end_loader_workers, keep_freed_memory, launched_by_rank_0
from organseg.runtime.checkpoint_io import AtomicCheckpointIO, newest_good, publish_copy
from organseg.runtime.ddp import guard_ranks
from organseg.runtime.metrics_log import MetricsLog, StepOffset
from organseg.runtime.pace import Pace
from organseg.runtime.precision import BF16, FP32, affordable_precision, machine
from organseg.runtime.ranks import SameWeights
from organseg.runtime.resume import FiniteLoss, LastCheckpoint, StepSeed
from organseg.runtime.run_folder import DATA, RunFolder, RunRecord, identity, plain
from organseg.runtime.signals import keep_handlers
from organseg.runtime.tracker import STOPPED, WandbTracker
from organseg.runtime.validation_cases import ValidationCases

_DEFAULTS = {
    # One GPU unless more are asked for: more share the batch, which is another training. torchrun says how many.
    "devices": "auto" if "TORCHELASTIC_RUN_ID" in os.environ else 1,
    "enable_progress_bar": True,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": False,  # data modules share cases and positions themselves
}


class _Finished(Exception):  # noqa: N818 - not an error
    """The run that `fit` was asked for is done already."""


class _Parser(LightningArgumentParser):
    """Errors become one line and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise instead of printing the usage."""
        known = known_cause(ex)
        if known:
            raise known
        raise UsageError(explained(" ".join(message.split())) + self._nearest(message))

    def _nearest(self, message: str) -> str:
        """A hint at the options that were meant."""
        found = re.search(r"unrecognized arguments: --([\w.]+)", message)
        if found and found[1] == "ckpt_path":
            return "; a stopped run goes on with the same command alone, and --init CKPT begins with a network"
        names = [name.lstrip("-") for name in self._option_string_actions]
        for parser in getattr(self._subcommands_action, "_name_parser_map", {}).values():
            names += [name.lstrip("-") for name in parser._option_string_actions]
        near = difflib.get_close_matches(found[1], sorted(set(names)), n=1) if found else []
        return f"; did you mean --{near[0]}?" if near else ""


class OrgansegCLI(LightningCLI):
    """Lightning's command line with a run folder, exact resume and a fixed set of callbacks that make it so."""

    def __init__(self, args: list[str]) -> None:
        self.run_folder: RunFolder
        self.run_record: RunRecord | None = None
        self.says_out = any(word.partition("=")[0] == "--out" for word in args)
        super().__init__(
            SegmentationModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults=_DEFAULTS,
            parser_class=_Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's; `fit` goes on with what the run folder holds, and takes no other checkpoint."""
        words = LightningCLI.subcommands()
        return {**words, "fit": words["fit"] | {"ckpt_path", "weights_only"}}

    def _parse_ckpt_path(self) -> None:
        """Nothing: checkpoints are verified before they are read, and say what they are in our own record."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of a run, and what data tell methods."""
        parser.add_argument("--out", type=str, default="runs/unnamed", help="The run folder.")
        parser.add_argument("--seed", type=int, default=0, help="Of weights, hidden labels, order and augmentation.")
        parser.add_argument("--init", type=str, default=None, help="Checkpoint whose network the training begins with.")
        parser.add_argument("--overwrite", action="store_true", help="Remove an older run in the folder first.")
        parser.add_argument("--checkpoint_every_s", type=float, default=120.0, help="Seconds between checkpoints.")
        parser.add_argument("--rank_timeout_s", type=float, default=600.0, help="That a rank waits for the others.")
        parser.add_argument(
            "--curriculum", type=Curriculum | None, default=None, help="Relabelling rounds; without it, one training."
        )
        parser.link_arguments("seed", "seed_everything")
        parser.link_arguments("seed", "data.init_args.seed")
        parser.link_arguments("data.organs", "model.init_args.organs", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            parser.add_argument("--shard", type=str, default="0/1", metavar="I/N", help="Every N-th case, from I on.")
        return parser

    def before_instantiate_classes(self) -> None:
        """Settle what the run folder has to say before data are touched."""
        self.run_folder = RunFolder(Path(self._get(self.config, "out")))
        if not self._fitting and not self.says_out:  # a run that was moved since its config was written
            self.run_folder = run_of(self._get(self.config, "ckpt_path")) or self.run_folder
        self.fresh = bool(self._get(self.config, "overwrite"))
        self.shard = Shard.parse(self._get(self.config, "shard", "0/1"))
        guard_ranks(self._get(self.config, "rank_timeout_s"))
        self._settle_precision()
        self._dump_config()
        config = self.config_dump
        self.wanted = plain(identity(config))
        if config.get("curriculum"):
            check_curriculum(config["curriculum"])
        self.initial = Path(config["init"]) if config.get("init") and self._fitting else None
        if self.initial:
            if self.run_folder.path.resolve() in self.initial.resolve().parents:
                raise UsageError(f"--init {self.initial}: lies in the run's own folder; choose another --out")
            self.wanted["init"] = verify_checkpoint(self.initial)
        for key, value in self.wanted.items():
            refused = isinstance(value, float) and not math.isfinite(value)
            if refused or (key.endswith(".lr") and value <= 0):
                raise UsageError(f"{key}: found {value}, expected a finite number{' above 0' * key.endswith('.lr')}")
        if self._fitting:
            if (self.run_folder.path / STOPPED).exists() and not self.fresh:
                ended = f"{self.run_folder.path}: W&B ended this run early"
                raise UsageError(f"{ended}; --overwrite starts anew, and without its file {STOPPED} it goes on")
            try:
                record = self.run_folder.record()
            except IntegrityError:
                if not config["overwrite"]:
                    raise
                record = None
            if record and not config["overwrite"]:
                self.run_folder.compare(record, {**self.wanted, DATA: record["identity"].get(DATA)})

    def _settle_precision(self) -> None:
        """Mixed precision where this machine has it; a run that was begun goes on in its own, wherever that is."""
        trainer = self._get(self.config, "trainer")
        begun = None
        if self._fitting and not self.fresh and trainer.precision == BF16:
            with contextlib.suppress(IntegrityError):  # said where the record is read
                begun = (self.run_folder.record() or {}).get("identity", {}).get("trainer.precision")
        if begun == FP32:
            trainer.precision = FP32
        elif begun != BF16:
            trainer.precision = affordable_precision(trainer.precision, trainer.accelerator)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer of a run without rounds, of `validate` and of `test`."""
        own: list[Callback] = []
        if self._fitting:
            own = self._surviving(self.run_folder.path, self._get(self.config_init, "seed"))
        given = self._get(self.config_init, "trainer")
        return self._make_trainer(own, given.get("callbacks") or [], 0, **kwargs)

    def _surviving(self, folder: Path, seed: int) -> list[Callback]:
        """The callbacks that make a fit survive; the checkpoint is the last of them."""
        config = {key: value for key, value in self.config_dump.items() if key not in ("ckpt_path", "overwrite")}
        # Who tests the run elsewhere has other machines.
        machines = ("num_nodes", "devices")
        config["trainer"] = {key: value for key, value in config["trainer"].items() if key not in machines}
        if self.run_record is None:
            self.run_record = RunRecord(self.run_folder, config, self.wanted, self.fresh)
        last = LastCheckpoint(folder / "checkpoints", self.config_dump["checkpoint_every_s"])
        return [self.run_record, StepSeed(seed), FiniteLoss(), Pace(), SameWeights(), last]

    def _make_trainer(
        self, own: Sequence[Callback], users: Sequence[Callback], offset: int, **kwargs: Any
    ) -> L.Trainer:
        """A trainer with the run's own logger, callbacks and checkpoint files; steps are logged from `offset` on."""
        given = self._get(self.config_init, "trainer")
        loggers = given.get("logger")
        chosen = [] if loggers in (None, True, False) else loggers if isinstance(loggers, list) else [loggers]
        self.trackers = [logger for logger in chosen if self._fitting and isinstance(logger, WandbTracker)]
        for tracker in self.trackers:
            tracker.follow(self.run_folder.path, self.wanted)
        if loggers is not False:
            metrics = [MetricsLog(self.run_folder.path / "metrics.csv")] if self._fitting else []
            logged = [*metrics, *chosen]
            kwargs["logger"] = [StepOffset(logger, offset) for logger in logged] if offset else logged
        shown = bool(given.get("enable_progress_bar") and sys.stdout.isatty())
        kwargs["enable_progress_bar"] = shown
        cases = [ValidationCases(tracker, offset) for tracker in self.trackers if tracker.images]
        kwargs["callbacks"] = [*users, *([RichProgressBar()] if shown else []), *cases, *own]
        kwargs["default_root_dir"] = str(self.run_folder.path)
        kwargs["plugins"] = [*(given.get("plugins") or []), AtomicCheckpointIO()]
        trainer: L.Trainer = super().instantiate_trainer(**kwargs)
        keep_handlers(trainer)
        return trainer

    # What a curriculum asks of its host.

    def new_module(self, seed: int, judge: bool = False) -> SegmentationModule:
        """A module of this config with new weights, or with those of `--init`; a judge owes nothing to others."""
        L.seed_everything(seed, verbose=False)
        module = build_module(self.config_dump["model"], self.datamodule.organs)
        if self.initial and not judge:
            begin_with(module, self.initial)
        return module

    def new_trainer(
        self, folder: Path, seed: int, steps: int, offset: int, kind: str, callbacks: Sequence[Callback]
    ) -> L.Trainer:
        """A trainer of a curriculum's phase; only segmentation trainings get the user's callbacks, fresh ones."""
        given = self._get(self.config_init, "trainer")
        users = copy.deepcopy(given.get("callbacks") or []) if kind == "train" else []
        record, *others = self._surviving(folder, seed)
        own = [record, *callbacks, *(others if kind != "relabel" else [])]
        # A confidence network is not validated; whatever is limited else, all cases are relabelled.
        changed: dict[str, dict[str, Any]] = {
            "confidence": {"limit_val_batches": 0},
            "relabel": {"limit_predict_batches": 1.0},
        }
        return self._make_trainer(own, users, offset, max_steps=steps, **changed.get(kind, {}))

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.config_dump["seed"])

    @property
    def round0_steps(self) -> int:
        """Optimiser steps of a run without rounds."""
        return int(self.config_dump["trainer"]["max_steps"])

    @property
    def identity(self) -> dict[str, Any]:
        """Of the run."""
        wanted: dict[str, Any] = self.wanted
        return wanted

    @property
    def _fitting(self) -> bool:
        return self.subcommand == "fit"

    def fit(self, model: SegmentationModule, datamodule: Any, **_: Any) -> None:
        """Train, or go on training."""
        run = self.run_folder
        self.wanted[DATA] = datamodule.content_hash
        self.lock = run.lock() if self.trainer.is_global_zero else None
        record = None if self.fresh else run.record()
        curriculum = self._get(self.config_init, "curriculum")
        if record:
            run.compare(record, self.wanted)
            self.wanted.update(run.paths_at_start(record))
            if record["finished"] and (not curriculum or curriculum.complete(self)):
                raise _Finished
        if self.trainer.is_global_zero:
            print(coverage(datamodule.cohort), flush=True)
            print(f"computes on {machine(self.trainer)}", flush=True)
        if self.initial:
            anew = begin_with(model, self.initial)
            if self.trainer.is_global_zero:
                print(f"begins with the network of {self.initial}; anew: {', '.join(anew) or 'nothing'}", flush=True)
        last = run.checkpoints / "last.ckpt"
        STOP.listen()  # from now on there is something to save, or it is made anew quickly
        if curriculum:
            result = curriculum.run(self, datamodule)
            if self.trainer.is_global_zero:
                publish_copy(result, last)
        else:
            resume, problems = (None, []) if self.fresh else newest_good(run.checkpoints)
            for problem in problems:
                print(f"organseg: warning: {problem}; going on from an older checkpoint", file=sys.stderr)
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=resume, weights_only=True)
        for tracker in self.trackers:
            tracker.finish(last)
        if self.trainer.is_global_zero:
            run.write(self.wanted, finished=True)
            print(f"organseg: finished: {last}")

    def test(self, model: L.LightningModule, datamodule: L.LightningDataModule, ckpt_path: Any, **_: Any) -> None:
        """Test a checkpoint, on all test cases or on a shard of them."""
        self._evaluate(self.trainer.test, model, datamodule, ckpt_path)

    def validate(self, model: L.LightningModule, datamodule: L.LightningDataModule, ckpt_path: Any, **_: Any) -> None:
        """Validate a checkpoint."""
        self._evaluate(self.trainer.validate, model, datamodule, ckpt_path)
        scores = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if self.trainer.is_global_zero:
            print(
                "\n".join(f"{name:<32}{100 * value:5.1f} %" for name, value in scores.items()) or "no validation case"
            )

    def _evaluate(self, stage: Any, model: L.LightningModule, datamodule: Any, ckpt_path: Any) -> None:
        if not ckpt_path:
            raise UsageError("say which checkpoint: --ckpt_path RUN/checkpoints/last.ckpt")
        refuse_other_run(Path(ckpt_path), self.wanted, datamodule.content_hash)
        if self.subcommand == "test":
            refuse_no_result(Path(ckpt_path), self.wanted, self.run_folder)
        if self.shard.count > 1:
            made_of = [__version__, verify_checkpoint(Path(ckpt_path)), self.wanted, datamodule.content_hash]
            datamodule.results = CaseResults(self.run_folder.path / "test", self.shard, made_of)
        digest, before = verify_checkpoint(Path(ckpt_path)), written(self.run_folder.path / "test")
        stage(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=True)
        if self.subcommand == "test" and self.trainer.is_global_zero:
            limit, after = self.trainer.limit_test_batches, written(self.run_folder.path / "test")
            if after == before or isinstance(limit, int) or limit < 1:  # the integer 1 is one batch
                return
            publish_text(self.run_folder.path / "test" / TESTED, f"{digest}\n")


def run_lightning(argv: Sequence[str], command: type[OrgansegCLI] = OrgansegCLI) -> int:
    """Run `fit`, `validate` or `test`; returns the exit code."""
    trust()
    keep_freed_memory()
    quieten()
    try:
        command(expand(argv))
    except _Finished:
        print("organseg: this run is finished; nothing to do (--overwrite starts anew)")
    except Exception as error:
        known = known_cause(error)
        if known and launched_by_rank_0() and _rank_0_ends():
            return known.exit_code  # all ranks fail alike, and rank 0 has said why
        if known:
            raise known from error
        raise
    finally:
        end_loader_workers()
    return 0


def _rank_0_ends(within_s: float = 10.0) -> bool:
    """Whether rank 0, which launched this one, ends by itself; as it does where all ranks fail alike."""
    rank_0, deadline = os.getppid(), time.monotonic() + within_s
    while os.getppid() == rank_0 and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != rank_0


def quieten() -> None:
    """Silence advice of Lightning's that does not hold here."""
    import logging

    for text in (
        ".*args parameter is intended to run from within Python.*",
        ".*Total length of .* across ranks is zero.*",  # nobody validates
        ".*does not have many workers.*",  # whole cases are read by the main process on purpose
        ".*The number of training batches.*",
        ".*in eval mode at the start of training.*",  # a confidence network trains on a frozen segmentation,
        ".*have no `validation_step`.*",  # and is not validated
        ".*It is recommended to use .self.log.*sync_dist=True.*",  # ranks have summed it already
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*is not supported by the model summary.*",
        ".*predict returned None.*",  # an input was refused, and that is said
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*`training_step` returned `None`.*",
        ".*when using `ckpt_path`, callbacks used to create the checkpoint need.*",  # a test needs no curriculum
    ):
        warnings.filterwarnings("ignore", text)
    for name in (
        "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed",
        "lightning.pytorch.accelerators.cuda",  # CUDA_VISIBLE_DEVICES, in each phase
    ):  # fmt: skip
        logging.getLogger(name).setLevel(logging.WARNING)
