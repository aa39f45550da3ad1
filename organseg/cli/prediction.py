"""`organseg predict`: label maps of new scans from a checkpoint and nothing else (DESIGN.md 4).

The checkpoint names the method, the network, the organs and what a scan goes through before it. Each input becomes
`OUT/<file name>.nii.gz` on its own grid; `predictions.jsonl`, one a shard, remembers what each output was made from, so
that the same command skips what is done and refuses to replace what was made otherwise.
"""

import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from organseg.batch import WholeCase
from organseg.checkpoints import verify_checkpoint
from organseg.cli.causes import known_cause
from organseg.cli.modules import load_module
from organseg.cli.training import quieten
from organseg.data.readers.folder import DICOM, scans_in
from organseg.data.shards import Shard
from organseg.errors import Fault, InputError, StorageError, UsageError
from organseg.files import publish_text, sha256_if_readable, sha256_of
from organseg.methods.base import SegmentationModule
from organseg.methods.ensemble import AS_IT_IS, AUGMENTED, Ensemble
from organseg.runtime.precision import affordable_precision
from organseg.runtime.signals import keep_handlers
from organseg.volumes import (
    AffineSource,
    Preprocessing,
    Volume,
    read_image,
    resample_image,
    write_label,
    write_map,
)

_BEGUN = "begun"
"""In the journal: the output is about to take its name."""


@dataclass(frozen=True)
class Job:
    """One input and where its label map goes."""

    input: Path
    output: Path
    made_from: dict[str, Any]


def predict(arguments: Namespace) -> int:
    """Segment all inputs; 3 if some were refused, the others are done."""
    try:
        return _predict(arguments)
    except Exception as error:
        known = known_cause(error)
        if known:
            raise known from error
        raise


def _predict(arguments: Namespace) -> int:
    quieten()
    paths, out = [Path(path) for path in arguments.ckpt_path], Path(arguments.out)
    digests = [verify_checkpoint(path) for path in paths]
    shard = Shard.parse(arguments.shard)
    everything = list(_inputs([Path(given) for given in arguments.input]))
    _refuse_collisions(everything, out)
    inputs = shard.of(everything)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: cannot be made: {error.strerror}; choose another --out") from error
    options = {"checkpoint": digests[0], "probabilities": arguments.probabilities}
    if len(digests) > 1 or arguments.tta:
        options |= {"checkpoints": digests, "tta": arguments.tta}
    jobs = _plan(inputs, out, options, arguments.overwrite)
    if not jobs:
        print(f"{out}: all {len(inputs)} outputs are made already")
        return 0
    precision = affordable_precision(arguments.precision, arguments.accelerator)
    module = _module(paths, arguments.tta)
    labels = {f"{k + 1}": organ for k, organ in enumerate(module.organs)}
    _refuse_other_labels(out, labels, everything if arguments.overwrite else [job.input for job in jobs])
    publish_text(out / "labels.json", json.dumps(labels, indent=1))
    scans = Scans(jobs, module.preprocessing, arguments.affine, arguments.assume_affine)
    trainer = L.Trainer(
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        use_distributed_sampler=False,
        callbacks=[Writer(jobs, out, arguments.probabilities, module.organs, shard)],
    )
    if trainer.world_size > 1:
        raise UsageError(f"--devices {arguments.devices}: one process predicts on one; start several, with --shard I/N")
    keep_handlers(trainer)
    loader = DataLoader(scans, batch_size=None, sampler=range(len(scans)))
    trainer.predict(module, loader, return_predictions=False)
    for fault in scans.faults:
        print(fault, file=sys.stderr)
    print(f"{out}: {len(jobs) - scans.refused} label maps written, {len(inputs) - len(jobs)} were there, "
          f"{scans.refused} inputs refused")  # fmt: skip
    return 3 if scans.refused else 0


def _module(paths: Sequence[Path], tta: bool) -> SegmentationModule | Ensemble:
    """The method of one checkpoint, or the mean of several, or of several views."""
    members = [load_module(path) for path in paths]
    return Ensemble(members, AUGMENTED if tta else AS_IT_IS) if len(members) > 1 or tta else members[0]


def _inputs(given: Sequence[Path]) -> Iterator[Path]:
    """All NIfTI files named or in the folders named, sorted, each once.

    Raises:
        UsageError: If a path does not exist, or a folder holds none.
    """
    found: dict[Path, None] = {}
    for path in given:
        if path.is_dir():
            files = sorted(file for file in scans_in(path) if file.name.endswith((".nii", ".nii.gz")))
            if not files:
                raise UsageError(f"{path}: no .nii or .nii.gz file in this folder; {DICOM}")
            found.update(dict.fromkeys(files))
        elif path.exists():
            found[path] = None
        else:
            raise UsageError(f"{path}: no such file or folder")
    return iter(found)


def _plan(inputs: Sequence[Path], out: Path, options: dict[str, Any], overwrite: bool) -> list[Job]:
    """What is still to do.

    Raises:
        UsageError: If an output exists that was made otherwise.
    """
    made = _made(out)
    jobs: list[Job] = []
    foreign: list[str] = []
    for path in inputs:
        output = _output_of(path, out)
        made_from = {**options, "input": sha256_if_readable(path)}
        if output.exists() and not overwrite:
            earlier, found = made.get(output.name, []), sha256_of(output)
            if {**made_from, "output": found} in earlier:
                continue
            of_this = {record["output"] for record in earlier if {**record, **made_from} == record}
            noted = found in [record["output"] for record in earlier]
            if noted or of_this != {_BEGUN}:  # else it was killed before it noted the hash
                foreign.append(str(output))
        jobs.append(Job(path, output, made_from))
    if foreign:
        raise UsageError(
            f"{', '.join(foreign[:3])}{' ...' if len(foreign) > 3 else ''}: not made from this input by this "
            "checkpoint; choose another --out, or replace with --overwrite"
        )
    return jobs


def _refuse_other_labels(out: Path, labels: dict[str, str], inputs: Sequence[Path]) -> None:
    """One `labels.json` says what the integers of all maps in a folder mean.

    Args:
        out: The folder.
        labels: Integer -> organ, of the maps to come.
        inputs: Whose maps are made, or made anew.

    Raises:
        UsageError: If maps that stay there were made with other organs.
    """
    file = out / "labels.json"
    stems = tuple(f"{name.removesuffix('nii.gz')}" for name in _made(out))
    maps = {path for path in out.glob("*.nii.gz") if not path.name.startswith(stems) or path.name in _made(out)}
    if not file.exists() or not maps - {_output_of(path, out) for path in inputs}:
        return
    try:
        same = json.loads(file.read_text()) == labels
    except ValueError:
        same = False
    if not same:
        raise UsageError(f"{out}: holds label maps of other organs ({file.name}); choose another --out")


def _output_of(path: Path, out: Path) -> Path:
    """Where the label map of an input goes."""
    return out / f"{path.name.removesuffix('.gz').removesuffix('.nii')}.nii.gz"


def _refuse_collisions(inputs: Sequence[Path], out: Path) -> None:
    """Of all inputs, whichever shard has them.

    Raises:
        UsageError: If two would get the same output, or one would be replaced by it.
    """
    taken: dict[Path, Path] = {}
    for path in inputs:
        output = _output_of(path, out)
        if output in taken:
            raise UsageError(f"{path} and {taken[output]} would both become {output}; predict them into two folders")
        taken[output] = path
        if output.resolve() == path.resolve():
            raise UsageError(f"{path}: the output would replace the input; choose another --out")


def _made(out: Path) -> dict[str, list[dict[str, Any]]]:
    """What earlier calls wrote down, all shards of them: records of each output; a torn last line is left out."""
    made: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("predictions*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
                made.setdefault(record.pop("name"), []).append(record)
            except (ValueError, KeyError, AttributeError):
                continue
    return made


class Scans(Dataset[WholeCase | None]):
    """Inputs as whole cases on their own grid; a refused one is None, its faults are kept."""

    def __init__(
        self, jobs: Sequence[Job], preprocessing: Preprocessing, affine: AffineSource | None, assume_affine: bool
    ) -> None:
        self.jobs = jobs
        self.affine: AffineSource | None = affine
        self.assume_affine = assume_affine
        self.preprocessing = preprocessing
        self.faults: list[Fault] = []
        self.refused = 0

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> WholeCase | None:
        job = self.jobs[number]
        modality = "CT" if self.preprocessing.normalisation else "MR"
        try:
            case = job.output.name.removesuffix(".nii.gz")
            volume, warnings = read_image(
                job.input,
                case=case,
                affine_source=self.affine,
                assume_affine=self.assume_affine,
                modality=modality,
            )
        except InputError as error:
            self.faults += error.faults
            self.refused += 1
            return None
        self.faults += warnings
        return self.case(number, volume)

    def case(self, number: int, volume: Volume) -> WholeCase:
        """What the network is asked: the same resampling and normalisation as in `prepare` and training."""
        shape = self.preprocessing.grid.shape(volume.shape, volume.spacing)
        image = volume.array if shape == volume.shape else resample_image(volume.array, shape)
        normalise = self.preprocessing.normalisation_of(image)
        return WholeCase(
            key=self.jobs[number].output.name.removesuffix(".nii.gz"),
            number=number,
            image=image,
            normalise=normalise,
            window=self.preprocessing.window,
            floor=normalise.floor,
            shape=volume.shape,
            spacing=volume.spacing,
            affine=volume.affine,
            truth=None,
            annotated=np.zeros(0, dtype=np.bool_),
        )


class Writer(L.Callback):
    """Segments each case as the trainer delivers it, and publishes its label map."""

    def __init__(
        self, jobs: Sequence[Job], out: Path, probabilities: bool, organs: Sequence[str], shard: Shard
    ) -> None:
        self.jobs = jobs
        # Of each shard its own: tasks on several machines cannot append to one file.
        self.journal = out / ("predictions.jsonl" if shard.count == 1 else f"predictions_{shard.name}.jsonl")
        self.out = out
        self.probabilities = probabilities
        self.organs = organs
        self.maps: NDArray[np.uint8] | None = None
        """Of the case that is being segmented, [K, Z, Y, X] in steps of 1/255."""

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        """Make room for the probabilities of one case."""
        if not self.probabilities or batch is None:
            return
        # On disk, not in memory: K volumes of 512 x 512 x 800 are 2.7 GB even as bytes.
        shape = (len(self.organs), *batch.shape)
        try:
            file = TemporaryFile(dir=self.out)  # noqa: SIM115 - until the case is written
            if hasattr(os, "posix_fallocate"):  # a full disk would end the process while the map is filled
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            else:
                file.truncate(math.prod(shape))
        except OSError as error:
            raise StorageError(f"{self.out}: no room for probabilities: {error.strerror}; free space") from error
        maps = np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)

        def keep(start: int, probs: torch.Tensor) -> None:
            organs = probs[:, -len(self.organs) :]
            maps[:, start : start + len(probs)] = (organs * 255).round().byte().cpu().numpy().swapaxes(0, 1)

        self.maps, pl_module.keep = maps, keep

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Write one case; with `probabilities` also `<name>.<organ>.nii.gz`, in steps of 1/255."""
        if batch is None:
            return
        job = self.jobs[batch.number]
        for organ, probs in zip(self.organs, self.maps, strict=True) if self.maps is not None else ():
            write_map(job.output.with_name(f"{batch.key}.{organ}.nii.gz"), probs, batch.affine)
        self.maps = pl_module.keep = None
        self._note(job, _BEGUN)
        write_label(job.output, outputs, batch.affine)
        self._note(job, sha256_of(job.output))

    def _note(self, job: Job, output: str) -> None:
        record = {"name": job.output.name, **job.made_from, "output": output}
        try:
            with self.journal.open("a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{self.journal}: cannot be written: {error.strerror}; free space") from error
