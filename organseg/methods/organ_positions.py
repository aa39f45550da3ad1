"""From whole cases to priors and positions: the grids in between (METHOD.md 2.1 and 2.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from organseg.batch import WholeCase
from organseg.files import publish_text
from organseg.priors import OrganPriors, Prior, Reference, build_prior, coarse_centre, corrected_centre, drawn
from organseg.priors.build import bounding_box
from organseg.volumes import WorkingGrid


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

    def masks(self, case: WholeCase) -> dict[int, tuple[NDArray[np.bool_], bool]]:
        """Of each annotated organ that the case shows: the mask in its bounding box, and whether the scan holds it all.

        An organ that reaches a border of the scan may be cut there.
        """
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
                whole = bool((low > 0).all() and (high < shape).all())
                found[int(channel)] = (mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], whole)
        return found


def learned_priors(
    cases: Sequence[WholeCase], organs: Sequence[str], grid: PriorGrid, bins: int | Literal["all"]
) -> OrganPriors:
    """Priors and references of all organs; cases that the field of view cuts count only where there is no other.

    Args:
        cases: The training cases of the fold, with what they annotate.
        organs: In channel order.
        grid: To build on.
        bins: Along z.
    """
    found: list[list[tuple[Reference, bool]]] = [[] for _ in organs]
    for number in range(len(cases)):
        case = cases[number]
        for channel, (mask, whole) in grid.masks(case).items():
            found[channel].append((Reference(case.key, mask), whole))
    pools = [tuple(ref for ref, whole in pool if whole) or tuple(ref for ref, _ in pool) for pool in found]
    priors: list[Prior | None] = []
    for organ, pool in zip(organs, pools, strict=True):
        if not pool:
            priors.append(None)
            continue
        depth = max(reference.mask.shape[0] for reference in pool)
        probs = build_prior([reference.mask for reference in pool], depth if bins == "all" else bins)
        size = (depth, *probs.shape[1:])
        z, y, x = (n * mm for n, mm in zip(size, grid.spacing, strict=True))
        cases_of = tuple(reference.case for reference in pool)
        priors.append(Prior(organ, probs, (z, y, x), grid.spacing, len(probs), cases_of))
    return OrganPriors(tuple(priors), tuple(pools))


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
    """How organs are found in a coarse segmentation.

    Attributes:
        grid: To find them on.
        references: Annotated cases that vote.
        max_shift_mm: Largest correction along each axis.
        seed: Draws the references.
    """

    grid: PriorGrid
    references: int
    max_shift_mm: float
    seed: int = 0

    def centres(
        self,
        case: WholeCase,
        probs: NDArray[np.floating],
        wanted: NDArray[np.bool_],
        references: Sequence[Sequence[Reference]],
    ) -> NDArray[np.float32]:
        """Where the wanted organs are.

        Args:
            case: The case with `grid` as its wanted grid.
            probs: [K, Z, Y, X] of the coarse model, on that grid.
            wanted: [K].
            references: Of each organ; where there is none the coarse centre stays.

        Returns:
            [K, 3] mm (z, y, x) from the first voxel of the case's image; NaN where not wanted, or nothing was found.
        """
        result = np.full((len(probs), 3), np.nan, dtype=np.float32)
        most = [round(self.max_shift_mm / mm) for mm in self.grid.spacing]
        for channel in map(int, np.flatnonzero(wanted)):
            coarse = coarse_centre(probs[channel])
            if coarse is not None:
                ours = drawn(references[channel], case.key, self.seed, self.references)
                result[channel] = in_mm(corrected_centre(probs[channel], coarse, ours, most), case)
        return result


def write_centres(
    path: Path, cases: Sequence[WholeCase], organs: Sequence[str], centres: Mapping[str, NDArray[np.float32]]
) -> None:
    """A table of where the organs of the training cases are, mm from the first voxel, and who says so."""
    lines = ["case,organ,from,z_mm,y_mm,x_mm"]
    for number in range(len(cases)):
        case = cases[number]
        for organ, annotated, centre in zip(organs, case.annotated, centres[case.key], strict=True):
            nowhere = bool(np.isnan(centre).any())
            sources = {(True, False): "annotation", (True, True): "absent", (False, False): "coarse model"}
            source = sources.get((bool(annotated), nowhere), "not found")
            place = ",,," if nowhere else "".join(f",{mm:.1f}" for mm in centre)
            lines.append(f"{case.key},{organ},{source}{place}")
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, "\n".join(lines) + "\n")
