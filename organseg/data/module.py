"""What the data modules of slices and of patches share: the cohort, whole cases, and what a curriculum asks for.

Training is counted in optimiser steps: the loader yields `trainer.max_steps` global batches, whose content is a pure
function of (seed, phase, step, position) (see `sampling.py`); one Lightning epoch is one phase, so that nothing but
the number of delivered batches has to be known to resume exactly.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from organseg.batch import Batch, WholeCase
from organseg.data.cache import SliceReader
from organseg.data.cohort import Cohort, CohortCase, CohortOptions, load_cohort
from organseg.data.pseudo_labels import RoundLabels
from organseg.data.sampling import SlicePlan, StepSampler
from organseg.data.shards import CaseResults
from organseg.data.staging import load_staged
from organseg.errors import UsageError
from organseg.processes import affordable_workers, as_loader_worker, default_workers
from organseg.volumes import Preprocessing, WorkingGrid, fit_normalisation

WORKER_TIMEOUT_S = 600


class CaseDataModule(L.LightningDataModule):
    """Base of the data modules.

    Args:
        options: What decides the cohort.
        batch_size: Samples in a global batch, over all ranks.
        workers: Loader processes of each rank; None takes one for each of its cores but one.
        window_hu: Intensities are clipped to it.
        patch: [Z, Y, X] of the patches that are trained on; None for slices.
        stage: Local folder that the cache is copied to before it is read; None to read it where it is.
        draw_annotated_only: See `SliceDataModule`.
    """

    results: CaseResults | None = None
    """Where a test that is one shard of several finds and leaves what is done."""

    def __init__(
        self,
        options: CohortOptions,
        batch_size: int,
        workers: int | None,
        window_hu: tuple[float, float],
        patch: tuple[int, int, int] | None,
        stage: Path | None = None,
        draw_annotated_only: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (workers or 0) < 0 or not window_hu[0] < window_hu[1]:
            raise UsageError(
                "batch_size must be at least 1, workers at least 0 and window_hu rising; "
                f"got {batch_size}, {workers}, {window_hu}"
            )
        self.cohort: Cohort = load_cohort(options) if stage is None else load_staged(options, Path(stage))
        self.organs = self.cohort.organs
        self.seed, self.batch_size, self.workers = options.seed, batch_size, workers
        self.window_hu = window_hu
        self.draw_annotated_only = draw_annotated_only
        self.preprocessing = Preprocessing(_working_grid(self.cohort), self._normalisation(), patch)
        self.enter_phase(0, None)

    def samples(self) -> "CaseSamples":
        """Training samples by (step, position)."""
        raise NotImplementedError

    def plan(self) -> SlicePlan:
        """The order of all training slices."""
        slices, by_organ = slice_tables(self.cohort.train, None if self.draw_annotated_only else self.round_labels)
        return SlicePlan(slices, by_organ, self.batch_size, self.seed, self.phase)

    def enter_phase(self, index: int, pseudo_labels: Path | None) -> None:
        """From now on train in the order of this phase, with the pseudo-labels of a folder, or with none."""
        keys = [case.key for case in self.cohort.train]
        self.phase = index
        self.round_labels = RoundLabels(pseudo_labels, keys, self.case_keys("predict")) if pseudo_labels else None

    def _normalisation(self) -> Any:
        """Of the fold's training cases; None where they are MR."""
        if any(case.cached.header.modality == "MR" for case in self.cohort.train):
            return None
        return fit_normalisation((case.cached.arrays().image for case in self.cohort.train), self.window_hu)

    @property
    def content_hash(self) -> str:
        """Of everything that training and test may see: changes with any voxel, annotation or split."""
        return self.cohort.content_hash

    def training_cases(self) -> "WholeCases":
        """The training cases on the working grid, read one by one; their truth is what they annotate."""
        return WholeCases(self.cohort.train, self.preprocessing, on_source_grid=False)

    def case_keys(self, stage: str) -> tuple[str, ...]:
        """Keys of the whole cases of a stage, in the order of their numbers."""
        return tuple(case.key for case in self._cases(stage))

    def _cases(self, stage: str) -> tuple[CohortCase, ...]:
        """`predict` means relabelling: training cases that lack an organ, and never a validation or test case."""
        if stage == "predict":
            return tuple(case for case in self.cohort.train if not case.known.all())
        return {"fit": self.cohort.train, "validate": self.cohort.val, "test": self.cohort.test}[stage]

    def unknown_organs(self, key: str) -> NDArray[np.bool_]:
        """[K]: organs that a training or validation case does not annotate."""
        return ~next(case for case in self.cohort.train + self.cohort.val if case.key == key).known

    def mean_volumes_ml(self) -> tuple[float, ...]:
        """[K]: mean volume of each organ over the training cases that annotate and show it; NaN where none does."""
        volumes: list[list[float]] = [[] for _ in self.organs]
        for case in self.cohort.train:
            voxels = case.cached.organ_counts.sum(axis=0)
            for channel, column in case.columns():
                if voxels[column]:
                    volumes[channel].append(float(voxels[column]) * self.voxel_ml(case.key))
        return tuple(float(np.mean(found)) if found else np.nan for found in volumes)

    def voxel_ml(self, key: str) -> float:
        """Volume of a voxel of the case's working grid."""
        return float(np.prod(self._training_case(key).cached.header.spacing)) / 1000

    def identity_of(self, key: str) -> tuple[str, str]:
        """Who a case is: the patient, and the sha256 of the image."""
        everyone = self.cohort.train + self.cohort.val + self.cohort.test
        header = next(case for case in everyone if case.key == key).cached.header
        return header.patient, header.image_sha256

    def hidden_organs(self, key: str) -> NDArray[np.bool_]:
        """[K]: organs whose truth `label_share` hides in a training case."""
        return self._hidden(key).known

    def hidden_truth(self, key: str) -> NDArray[np.uint8]:
        """What `label_share` hides of a training case, [Z, Y, X], 0 elsewhere: for reports, never for training."""
        hidden = self._hidden(key)
        return hidden.lookup[hidden.cached.arrays().label]

    def _hidden(self, key: str) -> CohortCase:
        """The case, seen through the organs that it hides."""
        case = self._training_case(key)
        known = frozenset(case.cached.header.annotated) & frozenset(self.organs)
        return replace(case, annotated=known - case.annotated)

    def _training_case(self, key: str) -> CohortCase:
        return next(case for case in self.cohort.train if case.key == key)

    def train_dataloader(self) -> "ResumableLoader":
        """`max_steps` global batches of this rank's share."""
        trainer = self.trainer
        assert trainer is not None
        if trainer.max_steps < 1:
            raise UsageError("training is counted in optimiser steps: set `--trainer.max_steps`, for example 2700")
        if self.batch_size % trainer.world_size:
            raise UsageError(
                f"batch_size {self.batch_size} cannot be shared equally by {trainer.world_size} ranks; set "
                "--data.init_args.batch_size, or --trainer.devices"
            )
        steps = trainer.max_steps * trainer.accumulate_grad_batches
        sampler = StepSampler(steps, self.batch_size, trainer.global_rank, trainer.world_size)
        samples = self.samples()
        first = [array.nbytes for array in samples[0, 0].values() if isinstance(array, np.ndarray)]
        batch_bytes = sum(first) * len(sampler.positions)
        wanted = default_workers(trainer.num_devices) if self.workers is None else self.workers
        workers = affordable_workers(wanted, batch_bytes, trainer.num_devices)
        if workers < wanted and trainer.is_global_zero:
            print(
                f"organseg: warning: /dev/shm has no room for the batches of {wanted} loader workers: {workers} "
                "instead; `organseg doctor` says how to give it more",
                file=sys.stderr,
            )
        return ResumableLoader(samples, sampler, workers)

    def val_dataloader(self) -> DataLoader[WholeCase | None] | list[Any]:
        """This rank's validation cases, on the working grid; nothing where nobody validates."""
        return self._whole_cases("validate") if self.cohort.val else []

    def test_dataloader(self) -> DataLoader[WholeCase | None]:
        """This rank's test cases, on their files' own grids; of a shard, those that are not done yet.

        Raises:
            UsageError: If the run tests nobody.
        """
        if not self.cohort.test:
            raise UsageError("nobody is tested with fold null; segment other scans by `predict`, score by `evaluate`")
        if self.results is None:
            return self._whole_cases("test")
        trainer = self.trainer
        assert trainer is not None
        # Rank 0 answers for all: another rank that looks later would find more cases done.
        missing = self.results.missing(self.case_keys("test")) if trainer.is_global_zero else []
        return self._whole_cases("test", trainer.strategy.broadcast(missing))

    def predict_dataloader(self) -> DataLoader[WholeCase | None]:
        """This rank's cases to relabel, on the working grid; their truth is what they annotate."""
        return self._whole_cases("predict")

    def _whole_cases(self, stage: str, some: Sequence[int] | None = None) -> DataLoader[WholeCase | None]:
        """Loads all cases of a stage, or those of some numbers."""
        trainer = self.trainer
        assert trainer is not None
        cases = WholeCases(self._cases(stage), self.preprocessing, on_source_grid=stage == "test")
        # Each case on exactly one rank, and as many turns on every rank: a rank without a turn would skip the hooks
        # in which the others wait for it. A shard with nothing left to do has a turn for the hook that ends it.
        numbers: Sequence[int] = range(len(cases)) if some is None else some or [len(cases)]
        beyond = [len(cases)] * (-len(numbers) % trainer.world_size)
        turns = [*numbers, *beyond][trainer.global_rank :: trainer.world_size]
        return DataLoader(cases, batch_size=None, sampler=turns, num_workers=0)


def _working_grid(cohort: Cohort) -> WorkingGrid:
    """The one grid that all cases were prepared on."""
    chosen = {
        (header.preprocessing.get("size"), header.preprocessing.get("spacing"))
        for header in (case.cached.header for case in cohort.train + cohort.val + cohort.test)
    }
    if len(chosen) > 1:
        named: dict[str, str] = {}
        for header in (case.cached.header for case in cohort.train + cohort.val + cohort.test):
            grid = ", ".join(f"{name} {value}" for name, value in header.preprocessing.items()) or "the scans' own"
            named.setdefault(header.key.partition("/")[0], grid)
        listed = "; ".join(f"{name}: {grid}" for name, grid in sorted(named.items()))
        raise UsageError(
            f"the data sets lie on different grids ({listed}); name some in data.init_args.datasets, or prepare them "
            "with the same --size or --spacing"
        )
    return WorkingGrid(*chosen.pop())


def slice_tables(
    cases: Sequence[CohortCase], pseudo: RoundLabels | None = None
) -> tuple[NDArray[np.int64], dict[int, NDArray[np.int64]]]:
    """All slices, and the slices that show each organ.

    Args:
        cases: Training cases.
        pseudo: Their pseudo-labels.

    Returns:
        [N, 2] (case, z), and for the channel of each organ that some case annotates (or was given) and shows, [n, 2]
        likewise.
    """
    slices: list[NDArray[np.int64]] = []
    shown: dict[int, list[NDArray[np.int64]]] = {}
    for number, case in enumerate(cases):
        counts = case.cached.organ_counts
        slices.append(np.stack([np.full(len(counts), number), np.arange(len(counts))], axis=1))
        for channel, column in case.columns():
            z = np.flatnonzero(counts[:, column])
            shown.setdefault(channel, []).append(np.stack([np.full(len(z), number), z], axis=1))
        added = pseudo.counts(number) if pseudo else None
        for channel, in_slices in enumerate(added.T if added is not None else ()):
            z = np.flatnonzero(in_slices)
            shown.setdefault(channel, []).append(np.stack([np.full(len(z), number), z], axis=1))
    tables = {channel: np.concatenate(shown[channel]) for channel in sorted(shown)}
    return np.concatenate(slices), {channel: table for channel, table in tables.items() if len(table)}


class CaseSamples(Dataset[dict[str, Any]]):
    """Training samples by (step, position): what slices and patches need to know of the cases.

    Args:
        cases: Training cases.
        plan: The order of their slices.
        preprocessing: Of all cases.
        pseudo: Pseudo-labels of the cases.
    """

    def __init__(
        self, cases: Sequence[CohortCase], plan: SlicePlan, preprocessing: Preprocessing, pseudo: RoundLabels | None
    ) -> None:
        self.plan = plan
        self.pseudo = pseudo
        self.reader = SliceReader([case.cached for case in cases])
        self.lookups = [case.lookup for case in cases]
        self.known = [case.known for case in cases]
        self.keys = [case.key for case in cases]
        self.centres = [case.centres() for case in cases]
        self.spacings = [case.cached.header.spacing for case in cases]
        shared = preprocessing.normalisation
        self.normalisations = [shared or preprocessing.normalisation_of(case.cached.arrays().image) for case in cases]

    def sample(
        self, case: int, image: NDArray[np.float32], label: NDArray[np.uint8], index_to_mm: NDArray[np.floating[Any]]
    ) -> dict[str, Any]:
        """One entry of a batch: image and label [*S], and where their indices lie in the case, [4, 4]."""
        return {
            "image": image[None],
            "label": label,
            "annotated": self.known[case],
            "case": self.keys[case],
            "index_to_mm": index_to_mm.astype(np.float32),
            "centre": self.centres[case],
        }


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack samples; cases stay a list."""

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([sample[name] for sample in samples]))

    return {
        "image": stacked("image"),
        "label": stacked("label"),
        "annotated": stacked("annotated"),
        "case": [sample["case"] for sample in samples],
        "index_to_mm": stacked("index_to_mm"),
        "centre": stacked("centre"),
    }


class ResumableLoader(DataLoader[Any]):
    """A loader that knows how many batches it has delivered; Lightning saves and restores that number."""

    def __init__(self, samples: Dataset[Any], sampler: StepSampler, workers: int) -> None:
        super().__init__(
            samples,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=as_loader_worker,
            timeout=WORKER_TIMEOUT_S if workers else 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: drawing worker seeds must not move the global generator
        )
        self.steps = sampler
        self.delivered = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator is all that a caller may rely on
        self.delivered = self.steps.start
        for batch in super().__iter__():
            self.delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches delivered, not those that workers have ready."""
        return {"delivered": self.delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the last delivered batch."""
        self.steps.start = state["delivered"]


class WholeCases(Dataset[WholeCase | None]):
    """Whole cases with their truth, on the working grid or on the files' own; None beyond the last."""

    def __init__(self, cases: Sequence[CohortCase], preprocessing: Preprocessing, on_source_grid: bool) -> None:
        self.cases = cases
        self.preprocessing = preprocessing
        self.on_source_grid = on_source_grid

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, number: int) -> WholeCase | None:
        if number >= len(self.cases):
            return None
        case = self.cases[number]
        header, arrays = case.cached.header, case.cached.arrays()
        truth = arrays.label
        if self.on_source_grid and arrays.source_label is not None:
            truth = arrays.source_label
        normalise = self.preprocessing.normalisation_of(arrays.image)
        return WholeCase(
            key=case.key,
            number=number,
            image=arrays.image,
            normalise=normalise,
            shape=(truth.shape[0], truth.shape[1], truth.shape[2]),
            spacing=header.source_spacing if self.on_source_grid else header.spacing,
            affine=np.asarray(header.affine),
            truth=case.lookup[truth],
            annotated=case.known,
            window=self.preprocessing.window,
            floor=normalise.floor,
        )
