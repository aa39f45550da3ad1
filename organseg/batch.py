"""What passes between data modules and methods: training batches and whole cases, and nothing else.

Dimension legend, used in `losses.py`, `networks/` and here: B cases or slices, C channels, K organs, *S the spatial
axes (H, W in 2D; D, H, W in 3D; rows are y, columns x, depth z, all LPS: indices grow to posterior, left, superior).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor  # its import takes seconds, and `check` and `prepare` need only IGNORE

IGNORE = 255
"""Label value of voxels whose truth is unknown for every organ, also for annotated ones (METHOD.md 1.2)."""


class View(TypedDict):
    """What a network is shown, 2D slices or 3D patches, and where in their cases they lie."""

    image: Tensor
    """[B, C, *S] float32, normalised."""
    case: list[str]
    """Case keys, `<data set>/<id>`."""
    index_to_mm: Tensor
    """[B, 4, 4] float32: index (z, y, x, 1) after augmentation -> mm (z, y, x, 1) from the case's first voxel, LPS."""
    centre: Tensor
    """[B, K, 3] float32: centre of each organ's bounding box, mm (z, y, x) likewise; NaN where unknown."""


class Batch(View):
    """One training batch."""

    label: Tensor
    """[B, *S] uint8: 0 background or unknown, 1..K organs in channel order, 255 ignore."""
    annotated: Tensor
    """[B, K] bool: the organ's truth is known in this case."""


@dataclass(eq=False)
class WholeCase:
    """A case to segment, and its truth where there is one."""

    key: str
    """`<data set>/<id>`, or the input's name in `predict`."""
    number: int
    """Its row in the evaluation's table."""
    image: NDArray[Any]
    """[Z, Y, X] on the working grid, not normalised."""
    normalise: Callable[[NDArray[Any]], NDArray[np.float32]]
    """Intensities to what the network sees; any shape."""
    shape: tuple[int, int, int]
    """[Z, Y, X] of the grid that the answer is wanted on."""
    spacing: tuple[float, float, float]
    """mm (z, y, x) of that grid."""
    affine: NDArray[np.float64]
    """Of the source file, voxel (x, y, z) -> world RAS mm."""
    truth: NDArray[np.uint8] | None
    """[Z, Y, X] on that grid, 0..K or 255."""
    annotated: NDArray[np.bool_]
    """[K]: what of the truth is known."""
    window: tuple[int, int, int] | None = None
    """[Z, Y, X] of the patches that a 3D network sees at a time, on the working grid; None for whole slices."""
    floor: float = 0.0
    """What the network sees outside of the image."""
    centre: NDArray[np.floating[Any]] | None = None
    """[K, 3] mm (z, y, x) from the first voxel of `image`: where a method takes the organs to be; NaN where unknown."""

    @property
    def working_spacing(self) -> tuple[float, float, float]:
        """Mm (z, y, x) of the working grid, which has the extent of the wanted one."""
        z, y, x = (mm * n / own for mm, n, own in zip(self.spacing, self.shape, self.image.shape, strict=True))
        return (z, y, x)


@runtime_checkable
class Describable(Protocol):
    """What a run asks a method for, to be saved in its checkpoints."""

    def describe(self) -> dict[str, Any]:
        """Plain values: `organs` in channel order, and `preprocessing`: what prediction needs beside weights."""


class CaseSource(Protocol):
    """What methods ask a data module for, beside its loaders."""

    organs: tuple[str, ...]
    """Canonical names in channel order."""

    @property
    def content_hash(self) -> str:
        """Of everything that training and test may see."""

    @property
    def preprocessing(self) -> Any:
        """`volumes.Preprocessing`: what a scan goes through before the network."""

    def training_cases(self) -> Sequence[WholeCase]:
        """The training cases on the working grid; their truth is what they annotate."""

    def unknown_organs(self, key: str) -> NDArray[np.bool_]:
        """[K]: which organs a training or validation case does not annotate."""

    def identity_of(self, key: str) -> tuple[str, str]:
        """Who a case is: the patient, and the sha256 of the image."""

    def case_keys(self, stage: str) -> tuple[str, ...]:
        """Keys of the cases of `fit`, `validate`, `test` or `predict`, in the order of their numbers."""


class RelabelSource(CaseSource, Protocol):
    """What a curriculum asks a data module for; its `predict` cases are the training cases that lack an organ."""

    def enter_phase(self, index: int, pseudo_labels: Path | None) -> None:
        """From now on train in the order of this phase, with the pseudo-labels of a folder, or with none."""

    def hidden_truth(self, key: str) -> NDArray[np.uint8]:
        """What `label_share` hid of a training case, [Z, Y, X], 0 elsewhere: for reports, never for training."""

    def mean_volumes_ml(self) -> tuple[float, ...]:
        """[K]: mean volume of each organ over the training cases that annotate and show it; NaN where none does."""

    def voxel_ml(self, key: str) -> float:
        """Volume of a voxel of the case's working grid."""

    def hidden_organs(self, key: str) -> NDArray[np.bool_]:
        """[K]: which organs' truth is hidden there."""


class Segmenter(Protocol):
    """What a curriculum asks a method for."""

    organs: tuple[str, ...]
    network: Any
    """With `features` and `head`."""
    memory_format: Any

    def inputs(self, view: View) -> Tensor:
        """What the network sees of a view, [B, C, *S]."""

    def organ_probabilities(self, view: View) -> Tensor:
        """Images [B, C, *S] -> the organs' probabilities [B, K, *S], fp32."""

    def all_sum(self, sums: Tensor) -> Tensor:
        """Sum over ranks, the other ranks' part detached."""

    def sweep(
        self,
        case: WholeCase,
        outputs: Callable[[View], Tensor],
        decide: Callable[[Tensor], Tensor],
        keep: Callable[[int, Tensor], None] | None = None,
    ) -> NDArray[np.uint8]:
        """A whole case through `outputs` (images -> channels), decided slab by slab; `keep` sees each slab."""
