"""From whole cases to priors and positions: the grids in between (METHOD.md 2.1 and 2.3)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from organseg.batch import WholeCase
from organseg.files import publish_text
from organseg.priors import (
    OrganPriors,
    Prior,
    Reference,
    build_prior,
    coarse_centre,
    continued,
    corrected_centre,
    drawn,
    matched_centre,
    matched_prior,
    slices_of,
    smoothed,
)
from organseg.priors.build import Box, binned, bounding_box
from organseg.volumes import WorkingGrid

MOST_REFERENCES = 16
"""Of an organ, that a checkpoint carries."""
Centring = Literal["boxes", "matched"]
Position = Literal["matched", "aligned", "naive", "true"]
SPECK = 0.02
"""Of an organ's mean volume: a smaller piece in a coarse segmentation is not the organ."""


@dataclass(frozen=True)
class PriorGrid:
    """The grid that priors are built and organs are found on.

    Attributes:
        spacing: mm (z, y, x); of a case, the nearest that divides its extent.
    """

    spacing: tuple[float, float, float]

    def of(self, case: WholeCase) -> WholeCase:
        """The case with this as its wanted grid; its truth is left out."""
        shape = WorkingGrid(spacing=self.spacing).shape(case.shape, case.spacing)
        z, y, x = (mm * n / new for mm, n, new in zip(case.spacing, case.shape, shape, strict=True))
        return replace(case, shape=shape, spacing=(z, y, x), truth=None, centre=None)

    def masks(self, case: WholeCase) -> dict[int, tuple[Reference, bool]]:
        """Of each annotated organ that the case shows: the mask in its bounding box, and whether the scan holds it all.

        An organ that reaches a border of the scan may be cut there.
        """
        shape = self.of(case).shape
        return {
            channel: (Reference(case.key, mask), bool((low > 0).all() and (high < shape).all()))
            for channel, (mask, (low, high)) in self.placed_masks(case).items()
        }

    def placed_masks(self, case: WholeCase) -> dict[int, tuple[NDArray[np.bool_], Box]]:
        """Of each annotated organ that the case shows: the mask in its bounding box, and that box."""
        assert case.truth is not None
        shape = self.of(case).shape
        nearest = [
            np.minimum(((np.arange(new) + 0.5) * n / new).astype(np.int64), n - 1)
            for new, n in zip(shape, case.truth.shape, strict=True)
        ]
        label = case.truth[np.ix_(*nearest)]
        found = {}
        for channel in np.flatnonzero(case.annotated):
            mask = label == channel + 1
            if mask.any():
                low, high = bounding_box(mask)
                found[int(channel)] = (mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], (low, high))
        return found


Pools = tuple[tuple[Reference, ...], ...]
"""Of each organ, its mask in each case that is annotated and shows it."""


def pooled(found: Sequence[Mapping[int, tuple[Reference, bool]]], organs: int) -> Pools:
    """What priors are built of; cases that the field of view cuts count only where there is no other.

    Args:
        found: Of each training case of the fold what `PriorGrid.masks` says.
        organs: How many.
    """
    pools: list[list[tuple[Reference, bool]]] = [[] for _ in range(organs)]
    for masks in found:
        for channel, mask in masks.items():
            pools[channel].append(mask)
    return tuple(tuple(ref for ref, whole in pool if whole) or tuple(ref for ref, _ in pool) for pool in pools)


def learned_prior(
    organ: str, pool: Sequence[Reference], positioning: "Positioning", bins: int | Literal["all"]
) -> Prior | None:
    """The prior of an organ; None where no case shows it.

    Args:
        organ: Canonical name.
        pool: Its part of what `pooled` says, or some of that.
        positioning: Its grid, and how organs are centred.
        bins: Along z.
    """
    if not pool:
        return None
    grid = positioning.grid
    masks = [reference.mask for reference in pool]
    if positioning.centring == "matched":
        slices = matched_prior(masks, positioning.max_shift)
    else:
        slices = build_prior(masks, max(len(mask) for mask in masks))
    if positioning.smooth_mm:
        slices = smoothed(slices, [positioning.smooth_mm / mm for mm in grid.spacing])
    depth = len(slices)
    probs = binned(slices, depth if bins == "all" else bins)
    size = (depth, *probs.shape[1:])
    z, y, x = (n * mm for n, mm in zip(size, grid.spacing, strict=True))
    return Prior(organ, probs, (z, y, x), grid.spacing, len(probs), tuple(reference.case for reference in pool))


def true_centres(case: WholeCase, organs: int) -> NDArray[np.float32]:
    """[K, 3] mm (z, y, x) from the first voxel of the case's image: centres of the annotated organs' bounding boxes.

    NaN where an organ is not annotated, or absent.
    """
    assert case.truth is not None
    centres = np.full((organs, 3), np.nan, dtype=np.float32)
    for channel in np.flatnonzero(case.annotated):
        mask = case.truth == channel + 1
        if mask.any():
            low, high = bounding_box(mask)
            centres[channel] = in_mm((low + high - 1) / 2, case)
    return centres


def in_mm(index: NDArray[np.float64], case: WholeCase) -> NDArray[np.float64]:
    """An index (z, y, x) of the case's wanted grid as mm from the first voxel of its working grid."""
    # Grids lie border on border: their first voxels' centres are half a voxel from the same corner.
    mm: NDArray[np.float64] = (index + 0.5) * np.array(case.spacing) - 0.5 * np.array(case.working_spacing)
    return mm


@dataclass(frozen=True)
class Positioning:
    """Where organs are taken to be.

    Attributes:
        grid: To find them on.
        centring: Of annotated organs: the middle of their bounding `boxes` (thesis), or where their prior fits best
            (`matched`); the prior is built accordingly.
        references: Annotated cases that vote on an alignment.
        max_shift_mm: Largest correction along each axis.
        smooth_mm: Standard deviation of the prior's blur; 0 is none (thesis).
        seed: Draws the references; the same in every run, as `predict` does not know a run's.
    """

    grid: PriorGrid
    centring: Centring
    references: int
    max_shift_mm: float
    smooth_mm: float = 0.0
    seed: int = 0

    @property
    def max_shift(self) -> list[int]:
        """In voxels (z, y, x)."""
        return [round(self.max_shift_mm / mm) for mm in self.grid.spacing]

    def annotated(self, case: WholeCase, known: OrganPriors) -> NDArray[np.float32]:
        """Centres of the annotated organs, [K, 3] mm as from `found`; NaN where not annotated, or absent.

        What is too small for the grid, or has no prior to match, is where its bounding box is.
        """
        result = true_centres(case, len(known.priors))
        if self.centring == "boxes":
            return result
        on_grid = self.grid.of(case)
        for channel, (mask, box) in self.grid.placed_masks(case).items():
            prior = known.priors[channel]
            if prior is not None:
                low, high = box
                whole = np.zeros(on_grid.shape, dtype=bool)
                whole[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = mask
                result[channel] = in_mm(self._matched(whole, box, slices_of(prior)), on_grid)
        return result

    def found(
        self,
        case: WholeCase,
        probs: NDArray[np.floating],
        wanted: NDArray[np.bool_],
        known: OrganPriors,
        position: Position,
    ) -> NDArray[np.float32]:
        """Where the wanted organs are in a coarse segmentation.

        Args:
            case: The case with `grid` as its wanted grid.
            probs: [K, Z, Y, X] of the coarse model, on that grid.
            wanted: [K].
            known: Priors and references of the organs.
            position: How.

        Returns:
            [K, 3] mm (z, y, x) from the first voxel of the case's image; NaN where not wanted, or nothing was found but
            specks.
        """
        result = np.full((len(probs), 3), np.nan, dtype=np.float32)
        for channel in map(int, np.flatnonzero(wanted)):
            prior = known.priors[channel]
            mean = None if prior is None else slices_of(prior)
            coarse = coarse_centre(probs[channel], 1 if mean is None else SPECK * float(mean.sum()))
            if coarse is None:
                continue
            if position == "matched" and mean is not None:
                centre = self._matched(probs[channel], coarse, mean)
            else:
                pool = known.references[channel] if position == "aligned" else ()
                ours = drawn(pool, case.key, self.seed, self.references)
                centre = corrected_centre(probs[channel], coarse, ours, self.max_shift)
            result[channel] = in_mm(centre, case)
        return result

    def _matched(
        self, probs: NDArray[np.floating] | NDArray[np.bool_], box: Box, mean: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Where the prior fits best, searched for around the whole organ, also if the scan shows a part of it."""
        return matched_centre(probs, continued(box, probs.shape, mean), mean, self.max_shift)


def write_centres(
    path: Path,
    annotated: Mapping[str, NDArray[np.bool_]],
    organs: Sequence[str],
    centres: Mapping[str, NDArray[np.float32]],
    found: Mapping[str, NDArray[np.float32]],
    without: Collection[str],
) -> None:
    """A table of where the organs of the training cases are, mm from the first voxel, and who says so.

    What has a centre, and was not `found`, was placed by the others. Organs `without` a prior are named so, wherever
    they are.
    """
    lines = ["case,organ,from,z_mm,y_mm,x_mm"]
    for key, known in annotated.items():
        for organ, given, centre, ours in zip(organs, known, centres[key], found[key], strict=True):
            nowhere, lost = bool(np.isnan(centre).any()), bool(np.isnan(ours).any())
            sources = {(True, False): "annotation", (True, True): "absent", (False, False): "coarse model"}
            source = sources.get((bool(given), lost), "not found" if nowhere else "other organs")
            source = "no prior" if organ in without else source
            place = ",,," if nowhere else "".join(f",{mm:.1f}" for mm in centre)
            lines.append(f"{key},{organ},{source}{place}")
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, "\n".join(lines) + "\n")
