"""`SliceDataModule`: 2D slices streamed from the cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organseg.data.augment import SliceAugmentation
from organseg.data.cohort import CohortCase, CohortOptions
from organseg.data.module import CaseDataModule, CaseSamples
from organseg.data.pseudo_labels import RoundLabels, merge
from organseg.data.sampling import SlicePlan
from organseg.errors import UsageError
from organseg.volumes import Preprocessing


class SliceDataModule(CaseDataModule):
    """Slices of partially labelled scans.

    Args:
        cache: Folder that `organseg prepare` filled.
        datasets: Data sets in it to use; default: all.
        organs: Canonical names in channel order; default: all that the data sets label.
        fold: The fold that is tested; null tests nobody.
        folds: Number of folds, by patient.
        fold_seed: Draws the folds; leave it alone so that runs compare.
        val_share: Share of the training patients that validate.
        label_share: Share of each organ's training and validation cases that keep its label (simulated partial labels).
        seed: Draws hidden labels, validation patients, order and augmentation.
        batch_size: Slices in a global batch, over all ranks.
        workers: Loader processes of each rank; null takes one for each of its cores but one.
        window_hu: Intensities are clipped to it.
        augmentation: Random changes to training slices, or null.
        test_datasets: Data sets of which every case is tested and none trained on; `fold`, `folds` and `fold_seed` then
            play no part, and the patients of the other data sets train and validate.
        stage: Local folder, for example on the node's own disk, to which the data sets are copied once a node before
            they are read; null reads the cache where it is.
        draw_annotated_only: The half of a batch that is drawn by organ shows cases that annotate the organ, never those
            that have pseudo-labels of it only: these say where it is, and hardly where it is not.
    """

    def __init__(
        self,
        cache: Path,
        datasets: Sequence[str] | None = None,
        organs: Sequence[str] | None = None,
        fold: int | None = 0,
        folds: int = 5,
        fold_seed: int = 0,
        val_share: float = 0.15,
        label_share: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
        workers: int | None = None,
        window_hu: tuple[float, float] = (-160.0, 300.0),
        augmentation: SliceAugmentation | None = SliceAugmentation(),  # noqa: B008 - frozen
        test_datasets: Sequence[str] | None = None,
        stage: Path | None = None,
        draw_annotated_only: bool = False,
    ) -> None:
        options = CohortOptions(
            Path(cache), datasets, organs, fold, folds, fold_seed, val_share, label_share, seed, test_datasets
        )
        super().__init__(options, batch_size, workers, window_hu, None, stage, draw_annotated_only)
        self.augmentation = augmentation

    def samples(self) -> "SliceSamples":
        """Training samples by (step, position)."""
        return SliceSamples(self.cohort.train, self.plan(), self.preprocessing, self.augmentation, self.round_labels)


class SliceSamples(CaseSamples):
    """Slices by (step, position).

    Args:
        cases: Training cases.
        plan: The order of their slices.
        preprocessing: Of all cases.
        augmentation: Random changes, or None.
        pseudo: Pseudo-labels of the cases.

    Raises:
        UsageError: If their slices have different sizes.
    """

    def __init__(
        self,
        cases: Sequence[CohortCase],
        plan: SlicePlan,
        preprocessing: Preprocessing,
        augmentation: SliceAugmentation | None,
        pseudo: RoundLabels | None = None,
    ) -> None:
        super().__init__(cases, plan, preprocessing, pseudo)
        first = cases[0]
        other = next((case for case in cases if case.cached.shape[1:] != first.cached.shape[1:]), None)
        if other and plan.batch_size > 1:
            sizes = [f"{case.key} ({' x '.join(map(str, case.cached.shape[1:]))})" for case in (first, other)]
            raise UsageError(
                f"slices of {' and '.join(sizes)} make no batch: prepare with --size N, which gives all slices N x N "
                "pixels, or train on patches (PatchDataModule)"
            )
        floors = {normalisation.floor for normalisation in self.normalisations}
        self.transforms = {floor: augmentation.compose(floor) for floor in floors} if augmentation else {}

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        draw = self.plan.draw(*key)
        image, label = self.reader.read(draw.case, draw.z)
        normalisation = self.normalisations[draw.case]
        image, label, after = normalisation(image), self.lookups[draw.case][label], np.eye(3)
        pseudo = self.pseudo.plane(draw.case, draw.z) if self.pseudo else None
        if pseudo is not None:
            label = merge(label, pseudo)
        if self.transforms:
            image, label, after = self.transforms[normalisation.floor](image, label, draw.rng)
        return self.sample(draw.case, image, label, index_to_mm(after, draw.z, self.spacings[draw.case]))


def index_to_mm(after: NDArray[np.float64], z: int, spacing: tuple[float, float, float]) -> NDArray[np.float32]:
    """Where the pixels of an augmented slice lie in their case.

    Args:
        after: [3, 3], pixel (x, y, 1) before -> after augmentation.
        z: The slice.
        spacing: mm (z, y, x).

    Returns:
        [4, 4], index (z, y, x, 1) with z counted from this slice -> mm (z, y, x, 1) from the case's first voxel.
    """
    before = np.linalg.inv(after)
    matrix = np.eye(4)
    matrix[0, 0], matrix[0, 3] = spacing[0], z * spacing[0]
    matrix[1, 1:] = np.array([before[1, 1], before[1, 0], before[1, 2]]) * spacing[1]
    matrix[2, 1:] = np.array([before[0, 1], before[0, 0], before[0, 2]]) * spacing[2]
    return matrix.astype(np.float32)
