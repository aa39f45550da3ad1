"""`PatchDataModule`: 3D patches streamed from the cache, of which no more is read than a patch needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organseg.data.augment3d import PatchAugmentation, Size, needed_box, resample
from organseg.data.cohort import CohortCase, CohortOptions
from organseg.data.module import CaseDataModule, CaseSamples
from organseg.data.pseudo_labels import RoundLabels, merge
from organseg.data.sampling import Draw, SlicePlan
from organseg.errors import UsageError
from organseg.volumes import Preprocessing


class PatchDataModule(CaseDataModule):
    """3D patches of partially labelled scans.

    Half of a batch walks through all slices of all cases, with the patch's middle anywhere in the slice; the other
    half draws an organ first, then a slice that shows it in a case that annotates it, then one of its voxels there,
    which augmentation does not move out of the patch.

    Args:
        cache: Folder that `organseg prepare` filled, best with `--spacing`.
        datasets: Data sets in it to use; default: all.
        organs: Canonical names in channel order; default: all that the data sets label.
        fold: The fold that is tested; null tests nobody.
        folds: Number of folds, by patient.
        fold_seed: Draws the folds; leave it alone so that runs compare.
        val_share: Share of the training patients that validate.
        label_share: Share of each organ's training and validation cases that keep its label (simulated partial labels).
        seed: Draws hidden labels, validation patients, order, places and augmentation.
        patch_size: Z, Y, X in voxels; whole cases are segmented in windows of this size.
        batch_size: Patches in a global batch, over all ranks.
        workers: See `SliceDataModule`.
        window_hu: Intensities are clipped to it.
        augmentation: Random changes to training patches, or null.
        test_datasets: See `SliceDataModule`.
        stage: See `SliceDataModule`.
        draw_annotated_only: See `SliceDataModule`.
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
        patch_size: Size = (96, 144, 144),
        batch_size: int = 2,
        workers: int | None = None,
        window_hu: tuple[float, float] = (-160.0, 300.0),
        augmentation: PatchAugmentation | None = PatchAugmentation(),  # noqa: B008 - frozen
        test_datasets: Sequence[str] | None = None,
        stage: Path | None = None,
        draw_annotated_only: bool = False,
    ) -> None:
        if min(patch_size) < 1:
            raise UsageError(f"patch_size must be three positive numbers, got {patch_size}")
        options = CohortOptions(
            Path(cache), datasets, organs, fold, folds, fold_seed, val_share, label_share, seed, test_datasets
        )
        super().__init__(options, batch_size, workers, window_hu, patch_size, stage, draw_annotated_only)
        self.patch_size = patch_size
        self.augmentation = augmentation

    def samples(self) -> "PatchSamples":
        """Training samples by (step, position)."""
        return PatchSamples(
            self.cohort.train, self.plan(), self.preprocessing, self.patch_size, self.augmentation, self.round_labels
        )


class PatchSamples(CaseSamples):
    """Patches by (step, position).

    Args:
        cases: Training cases.
        plan: The order of their slices, in which the patches have their middles.
        preprocessing: Of all cases.
        patch: [Z, Y, X] of a patch.
        augmentation: Random changes, or None.
        pseudo: Pseudo-labels of the cases.
    """

    def __init__(
        self,
        cases: Sequence[CohortCase],
        plan: SlicePlan,
        preprocessing: Preprocessing,
        patch: Size,
        augmentation: PatchAugmentation | None,
        pseudo: RoundLabels | None = None,
    ) -> None:
        super().__init__(cases, plan, preprocessing, pseudo)
        self.patch = patch
        self.augmentation = augmentation
        self.shapes = [case.cached.shape for case in cases]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        draw = self.plan.draw(*key)
        case = draw.case
        normalisation = self.normalisations[case]
        to_case = self._place(draw)
        box = needed_box(to_case, self.patch, self.shapes[case])
        image, label = self._read(case, box)
        to_part = to_case.copy()
        to_part[:3, 3] -= box[:, 0]
        image, label = resample(normalisation(image), label, to_part, self.patch, normalisation.floor)
        if self.augmentation:
            image = self.augmentation.intensities(image, draw.rng)
        return self.sample(case, image, label, np.diag([*self.spacings[case], 1]) @ to_case)

    def _read(self, case: int, box: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Image and label of a part of a case, with pseudo-labels."""
        image, label = self.reader.read_box(case, box)
        label = self.lookups[case][label]
        pseudo = self.pseudo.box(case, box) if self.pseudo else None
        return image, label if pseudo is None else merge(label, pseudo)

    def _place(self, draw: Draw) -> NDArray[np.float64]:
        """[4, 4]: index (z, y, x, 1) of the patch -> index of the case, augmentation included."""
        patch, shape, spacing = (
            np.asarray(values) for values in (self.patch, self.shapes[draw.case], self.spacings[draw.case])
        )
        middle = self._middle(draw)
        start = patch_start(middle, patch, shape)
        from_middle = np.eye(4)
        from_middle[:3, 3] = -(patch - 1) / 2
        to_mm = np.diag([*spacing, 1])
        change = self.augmentation.matrix(draw.rng, patch * spacing) if self.augmentation else np.eye(4)
        to_place = np.eye(4)
        to_place[:3, 3] = start + (patch - 1) / 2
        to_case = to_place @ np.linalg.inv(to_mm) @ change @ to_mm @ from_middle
        return to_case if draw.organ is None else showing(middle, to_case, patch)

    def _middle(self, draw: Draw) -> NDArray[np.int64]:
        """The voxel (z, y, x) that the patch is to have in its middle."""
        shape = self.shapes[draw.case]
        if draw.organ is not None:
            box = np.array([(draw.z, draw.z + 1), (0, shape[1]), (0, shape[2])])
            _, label = self._read(draw.case, box)
            pixels = np.argwhere(label[0] == draw.organ + 1)
            return np.array([draw.z, *pixels[draw.rng.integers(len(pixels))]])
        return np.array([draw.z, draw.rng.integers(shape[1]), draw.rng.integers(shape[2])])


def showing(voxel: NDArray[np.int64], to_case: NDArray[np.float64], patch: NDArray[np.int64]) -> NDArray[np.float64]:
    """A patch's place in a case, moved where a voxel has fallen out of the patch until it is back at its border.

    Args:
        voxel: [3] index (z, y, x) of the case.
        to_case: [4, 4], index (z, y, x, 1) of the patch -> of the case.
        patch: [3] its size.
    """
    index = (np.linalg.inv(to_case) @ [*voxel, 1])[:3]
    beyond = index - np.clip(index, 0, patch - 1)
    beyond[np.abs(beyond) <= 0.5] = 0  # half a voxel around the outermost centres is inside
    moved = to_case.copy()
    moved[:3, 3] += to_case[:3, :3] @ beyond
    return moved


def patch_start(middle: NDArray[np.int64], patch: NDArray[np.int64], shape: NDArray[np.int64]) -> NDArray[np.int64]:
    """First index of a patch around a voxel: inside the case, or around all of it where it is smaller than the patch.

    Args:
        middle: [3] voxel (z, y, x).
        patch: [3] its size.
        shape: [3] of the case.
    """
    inside = np.clip(middle - patch // 2, 0, np.maximum(shape - patch, 0))
    return np.where(shape >= patch, inside, -((patch - shape) // 2))
