"""`Curriculum`: relabelling rounds in one `fit` (METHOD.md 1.5, Algorithms 1 and 2).

Each phase (train, confidence, relabel) is an ordinary Trainer run that turns published files into published files. No
object crosses a phase's edge, so a run that was killed takes the path of one that was not: finished phases are skipped
by the journal, the unfinished one goes on from its own checkpoint by Lightning's plain resume. One fit that switches
phases in a callback would have to clear optimisers, learning rates, patience and best scores by hand, and re-wrap DDP
for a module whose trained parameters change; entering one Trainer's fit twice trains nothing at all.

The methods know nothing of rounds. A phase's index is 3 t - 2 for the confidence, 3 t - 1 for the relabelling and 3 t
for the training of round t, whatever the score: batches of one round are the same for every score.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, final

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback

from organseg.batch import RelabelSource
from organseg.checkpoints import load_checkpoint, verify_checkpoint
from organseg.curriculum.journal import Entry, Journal, chain, digest_of
from organseg.curriculum.phases import Kind, Phase, seed_of
from organseg.curriculum.quality import RoundReport, refuse_collapse
from organseg.curriculum.relabel import Relabelling, Round, Turns, stop_if_asked
from organseg.curriculum.scores import LearnedConfidence, MaximumClassProbability, Score
from organseg.curriculum.selection import Selection
from organseg.data.pseudo_labels import PSEUDO_LABELS, path_of, read_round_header
from organseg.data.sealed import verify_sealed
from organseg.errors import IntegrityError, UsageError, WorkerError
from organseg.files import publish_text
from organseg.methods.base import SegmentationModule
from organseg.runtime.checkpoint_io import newest_good, publish_copy
from organseg.runtime.run_folder import RunFolder


class Host(Protocol):
    """What the command line gives a curriculum: the run, and fresh modules and trainers of its config."""

    run_folder: RunFolder
    seed: int
    round0_steps: int
    fresh: bool
    """Whatever lies in the run folder is to be removed."""
    identity: dict[str, Any]
    """Of the run; the curriculum's own options begin with `curriculum.`."""

    def new_module(self, seed: int, judge: bool = False) -> SegmentationModule:
        """A module with new weights; a judge's are new also where others begin with a checkpoint's."""

    def new_trainer(
        self, folder: Path, seed: int, steps: int, offset: int, kind: Kind, callbacks: Sequence[Callback]
    ) -> L.Trainer:
        """A trainer whose checkpoints lie in the folder; steps are logged from `offset` on."""


@final
class Curriculum(Callback):
    """Drives the rounds; in each phase's trainer it checks that all ranks are at the same place.

    Args:
        rounds: T. Round 0 trains on annotations alone, `trainer.max_steps` long.
        gamma_max: Share of the candidates that the last round adds; round t adds t / T of it.
        round_steps: Optimiser steps of each later round's training.
        score: Ranks candidates: `confidence` (learned), `mcp` (probability), or another `Score`.
        start: Weights that a round's training starts from: `initial` (round 0's), `previous` (the last round's) or
            `scratch`.
        lr_share: Learning rate at the start of a round that starts from trained weights, as a share of round 0's.
        accumulate: Keep the pseudo-labels of earlier rounds and add to them, instead of choosing anew in each round.
        result: The `last` round's network, or that of the `best` round on the validation cases.
        selection: What may become a pseudo-label, beside the score; the default is the thesis's.
        round0: Run folder whose round 0 is taken over, if it was trained with the same config and data.

    Raises:
        UsageError: If options cannot mean what they say, alone or together.
    """

    def __init__(
        self,
        rounds: int = 3,
        gamma_max: float = 1.0,
        round_steps: int = 1000,
        score: Literal["confidence", "mcp"] | Score = "confidence",
        start: Literal["initial", "previous", "scratch"] = "initial",
        lr_share: float = 0.5,
        accumulate: bool = False,
        result: Literal["last", "best"] = "last",
        selection: Selection = Selection(),  # noqa: B008 - frozen
        round0: Path | None = None,
    ) -> None:
        if rounds < 1 or round_steps < 1 or not 0 < gamma_max <= 1 or not 0 < lr_share <= 1:
            raise UsageError(
                f"curriculum: rounds {rounds} and round_steps {round_steps} must be at least 1, gamma_max {gamma_max} "
                f"and lr_share {lr_share} in 0..1"
            )
        named: dict[str, Score] = {"confidence": LearnedConfidence(), "mcp": MaximumClassProbability()}
        self.score: Score = named[score] if isinstance(score, str) else score
        self.rounds = rounds
        self.gamma_max = gamma_max
        self.round_steps = round_steps
        self.start = start
        self.lr_share = lr_share
        self.accumulate = accumulate
        self.result = result
        self.selection = selection
        self.round0 = round0
        self.phase = Phase(0, 0, "train")
        self.parent = ""
        self.resume_digest = ""
        self._refuse_contradictions()

    # The plan.

    def plan(self) -> list[Phase]:
        """All phases, in order."""
        phases = [Phase(0, 0, "train")]
        for t in range(1, self.rounds + 1):
            if self.score.steps and (t == 1 or not self.score.once):
                phases.append(self._confidence(t))
            phases += [Phase(3 * t - 1, t, "relabel"), Phase(3 * t, t, "train")]
        return phases

    def steps_of(self, phase: Phase, round0_steps: int) -> int:
        """Optimiser steps of a phase."""
        if phase.kind == "relabel":
            return 0
        if phase.kind == "confidence":
            return self.score.steps
        return self.round_steps if phase.round_index else round0_steps

    def _refuse_contradictions(self) -> None:
        chosen = self.selection
        if self.result == "best" and self.round0 is not None:
            raise UsageError("curriculum: `result: best` also compares round 0, which `round0` does not validate")
        if self.accumulate and (chosen.smooth_mm or chosen.largest_piece or chosen.max_volume is not None):
            raise UsageError(
                "curriculum: `accumulate` chooses among what earlier rounds left over, which smooth_mm, largest_piece "
                "and max_volume do not suit: set them to 0, false and null in curriculum.selection"
            )
        if isinstance(self.score, LearnedConfidence) and chosen.threshold < 0.5:
            raise UsageError(
                f"curriculum.selection.threshold: {chosen.threshold}: below 0.5 a learned confidence is that of the "
                "organ's absence; set 0.5 or more, or rank by another `curriculum.score`"
            )

    # The driver.

    def complete(self, host: Host) -> bool:
        """Whether a run's journal has all phases."""
        names = [phase.name for phase in self.plan()]
        known = chain(host.run_folder.path / "journal.jsonl", digest_of(host.identity))
        return [entry.phase for entry in known[: len(names)]] == names

    def run(self, host: Host, data: L.LightningDataModule) -> Path:
        """Walk the plan from the first unfinished phase; returns the resulting checkpoint.

        Raises:
            IntegrityError: If a finished phase's result, or the adopted round 0, is not what it was.
            NumericsError: If a round's pseudo-labels have collapsed.
        """
        self.host, self.data, self.folder = host, data, host.run_folder.path
        if host.round0_steps < 1:
            raise UsageError("training is counted in optimiser steps: set `--trainer.max_steps`, that of round 0")
        source: RelabelSource = data  # type: ignore[assignment]  # a Protocol, checked by use
        if not source.case_keys("predict"):
            raise UsageError("curriculum: every training case annotates every organ: there is nothing to relabel")
        validating = source.case_keys("validate")
        if self.result == "best" and all(source.unknown_organs(key).all() for key in validating):
            raise UsageError(
                "curriculum: `result: best` needs validation cases that annotate an organ: raise "
                f"data.init_args.val_share; found {len(validating)} cases without one"
            )
        self.journal = Journal(self.folder, _digest)
        plan = self.plan()
        root = digest_of(host.identity)
        entries = [] if host.fresh else self.journal.finished([phase.name for phase in plan], root)
        self.adopted = self._adopt(root) if self.round0 and not entries else None
        if self.adopted:
            entries = [self.adopted]
        offsets = np.cumsum([0, *(self.steps_of(phase, host.round0_steps) for phase in plan)])
        self.scores = {entry.phase: entry.score for entry in entries}
        for number, phase in enumerate(plan):
            if number < len(entries):
                continue
            self.phase, self.parent = phase, entries[-1].digest if entries else root
            outputs, score = self._run_phase(phase, int(offsets[number]), source)
            entries.append(Entry(phase.name, self.parent, outputs, score))
            self.scores[phase.name] = score
            if self.trainer.is_global_zero:
                self.journal.append(entries[-1])
            self.trainer.strategy.barrier(f"{phase.name} is in the journal")
        return self._checkpoint(self._chosen(plan))

    def _run_phase(self, phase: Phase, offset: int, source: RelabelSource) -> tuple[dict[str, str], float | None]:
        """Run one phase; returns its results' digests, and the validation score where it is asked for."""
        seed = seed_of(self.host.seed, phase.index)
        module = self.host.new_module(seed)
        steps = self.steps_of(phase, self.host.round0_steps)
        folder = self.folder / phase.name
        resume, problems = (None, []) if self.host.fresh else newest_good(folder / "checkpoints")
        self.resume_digest = verify_checkpoint(resume) if resume else ""
        for problem in problems:
            print(f"organseg: warning: {problem}; going on from an older checkpoint", file=sys.stderr)
        more: list[Callback] = [self]
        if phase.kind == "relabel":
            more.append(Turns(len(source.case_keys("predict"))))
        self.trainer = self.host.new_trainer(folder, seed, max(steps, 1), offset, phase.kind, more)
        if self.result == "best" and phase.kind == "train" and not self.trainer.limit_val_batches:
            raise UsageError("curriculum: `result: best` needs validations; drop trainer.limit_val_batches")
        self._announce(phase, steps, source)
        if phase.kind == "relabel":
            return self._relabel(phase, module, source), None
        source.enter_phase(phase.index, self._pseudo_labels(phase))
        trained: L.LightningModule = module
        if phase.kind == "confidence":
            self._load(module, self._latest(phase))
            learner = self._learner(phase, module, source)
            assert learner is not None
            trained = learner
        elif phase.round_index and self.start != "scratch":
            self._load(module, Phase(0, 0, "train") if self.start == "initial" else self._latest(phase))
            module.lr_share = self.lr_share
        elif phase.round_index:
            module.afresh = True
        self.trainer.fit(trained, datamodule=self.data, ckpt_path=resume, weights_only=True)
        score = None
        if phase.kind == "train" and self.result == "best":
            self.trainer.validate(module, datamodule=self.data, verbose=False)
            score = float(self.trainer.callback_metrics["val/dsc"])
        last = folder / "checkpoints" / "last.ckpt"
        return {str(last.relative_to(self.folder)): verify_checkpoint(last)}, score

    def _announce(self, phase: Phase, steps: int, source: RelabelSource) -> None:
        """One line at the start of a phase."""
        what = {
            "train": f"training, {steps} steps",
            "confidence": f"training what ranks the candidates, {steps} steps",
            "relabel": f"relabelling {len(source.case_keys('predict'))} cases",
        }
        if self.trainer.is_global_zero:
            print(f"\nround {phase.round_index}: {what[phase.kind]}", flush=True)

    def _relabel(self, phase: Phase, module: SegmentationModule, source: RelabelSource) -> dict[str, str]:
        """Make a round's pseudo-labels and report on them."""
        t = phase.round_index
        self._load(module, self._latest(phase))
        learner = self._learner(phase, module, source)
        if learner is not None:
            confidence = self._checkpoint(self._confidence(t))
            learner.load_state_dict(load_checkpoint(confidence)["state_dict"])
        before = self._round_folder(t - 1) if self.accumulate and t > 1 else None
        task = Round(
            t,
            self.gamma_max * t / self.rounds,
            self._round_folder(t),
            self.parent,
            before,
            self.selection,
            source.mean_volumes_ml(),
            frozenset(source.case_keys("fit")),
        )
        relabelling = Relabelling(module, learner, self.score.scorer(module, learner), task)
        self.trainer.predict(relabelling, datamodule=self.data, return_predictions=False)
        self.trainer.strategy.barrier("all cases are relabelled")
        keys = source.case_keys("predict")
        headers = [read_round_header(task.folder, key) for key in keys]
        report = RoundReport(self.folder / phase.name, task.folder, headers, source)
        for header in headers:
            if self.trainer.is_global_zero:
                report.add(header)
            stop_if_asked(self.trainer)  # after each: many cases take longer than ranks wait for each other
        if self.trainer.is_global_zero:
            report.write()
        refuse_collapse(headers, source)
        files = [path_of(task.folder, key) for key in keys]
        return {str(path.relative_to(self.folder)): _digest(path) for path in files}

    def _learner(self, phase: Phase, module: SegmentationModule, source: RelabelSource) -> L.LightningModule | None:
        """What the score has to learn, with new weights."""
        numbers = itertools.count(1)

        def fresh() -> SegmentationModule:
            return self.host.new_module(seed_of(self.host.seed, phase.index, next(numbers)), judge=True)

        annotated = {key: ~source.unknown_organs(key) for key in source.case_keys("fit")}
        return self.score.learner(module, fresh, annotated)

    # Where things are.

    def _round_folder(self, t: int) -> Path:
        return self.folder / "pseudo_labels" / f"round_{t}"

    def _pseudo_labels(self, phase: Phase) -> Path | None:
        """Of a training; the confidence network sees annotations alone."""
        return self._round_folder(phase.round_index) if phase.kind == "train" and phase.round_index else None

    def _confidence(self, t: int) -> Phase:
        """Where the learner of a round's score is trained."""
        t = 1 if self.score.once else t
        return Phase(3 * t - 2, t, "confidence")

    def _latest(self, phase: Phase) -> Phase:
        """The training before a phase."""
        before = phase.round_index - 1
        return Phase(3 * before, before, "train")

    def _checkpoint(self, phase: Phase) -> Path:
        path = self.folder / phase.name / "checkpoints" / "last.ckpt"
        return _round0_of(self.round0) if phase.index == 0 and self.adopted and self.round0 else path

    def _load(self, module: SegmentationModule, phase: Phase) -> None:
        module.load_state_dict(load_checkpoint(self._checkpoint(phase))["state_dict"])

    def _chosen(self, plan: Sequence[Phase]) -> Phase:
        """Of the phase whose network is the result; the earliest of equally good ones."""
        trained = [phase for phase in plan if phase.kind == "train"]
        if self.result == "last":
            return trained[-1]
        return max(trained, key=lambda phase: self.scores[phase.name] or 0.0)

    def _adopt(self, root: str) -> Entry:
        """Round 0 of another run, if it is the one that this run would train."""
        assert self.round0 is not None
        path = _round0_of(self.round0)
        checkpoint = load_checkpoint(path)
        found = _of_round0(checkpoint.get("organseg", {}).get("identity", {}))
        wanted = _of_round0(self.host.identity)
        if found != wanted:
            keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            raise IntegrityError(
                f"{path}: not the round 0 of this run\n  "
                + "\n  ".join(f"{key}: there {found.get(key, 'nothing')}, here {wanted.get(key)}" for key in keys)
            )
        if checkpoint["global_step"] != self.host.round0_steps:
            raise IntegrityError(
                f"{path}: stopped after {checkpoint['global_step']} of {self.host.round0_steps} steps; finish that run"
            )
        name = f"{Phase(0, 0, 'train').name}/checkpoints/last.ckpt"
        return Entry(Phase(0, 0, "train").name, root, {name: verify_checkpoint(path)})

    # As a callback of each phase's trainer.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The first moment at which ranks can talk: all must be at the same place."""
        mine = (self.phase.name, self.parent, self.resume_digest)
        agreed = trainer.strategy.broadcast(mine) == mine
        if not trainer.strategy.reduce_boolean_decision(agreed):
            raise WorkerError(
                f"{self.folder}: the ranks disagree about the next phase or its checkpoint; is the folder shared?"
            )
        if self.adopted and trainer.is_global_zero:
            assert self.round0 is not None
            publish_copy(_round0_of(self.round0), self.folder / next(iter(self.adopted.outputs)))
            for note in self.round0.glob("prior/[!.]*"):  # what it was begun with, and where its organs are
                (self.folder / "prior").mkdir(exist_ok=True)
                publish_text(self.folder / "prior" / note.name, note.read_text())
            self.journal.append(self.adopted)
        if self.adopted:
            trainer.strategy.barrier("round 0 is taken over")
            self.adopted = None

    def state_dict(self) -> dict[str, Any]:
        """Where a checkpoint belongs."""
        return {"phase": self.phase.name, "parent": self.parent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another phase."""
        if state_dict != self.state_dict():
            raise IntegrityError(
                f"{self.folder / self.phase.name}: its checkpoint belongs to {state_dict}, expected "
                f"{self.state_dict()}; remove that folder to do the phase again"
            )


def _digest(path: Path) -> str:
    """Of a result: a checkpoint or a pseudo-label file."""
    return verify_checkpoint(path) if path.suffix == ".ckpt" else verify_sealed(path, PSEUDO_LABELS)


def _round0_of(run: Path) -> Path:
    """The checkpoint of a run's round 0: a curriculum's, or that of a run without rounds."""
    phase = run / Phase(0, 0, "train").name / "checkpoints" / "last.ckpt"
    return phase if phase.exists() else run / "checkpoints" / "last.ckpt"


def _of_round0(identity: Mapping[str, Any]) -> dict[str, Any]:
    of_rounds = ("curriculum.", "data.draw_annotated_only")  # without pseudo-labels all is drawn from annotations
    return {key: value for key, value in identity.items() if not key.startswith(of_rounds)}
