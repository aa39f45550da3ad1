"""Several checkpoints, or one scan seen in several ways, as one prediction: the mean of their probabilities."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from organseg.batch import View, WholeCase
from organseg.errors import UsageError
from organseg.methods.base import SegmentationModule

Change = tuple[float, int, int]
"""Gain of the normalised intensities, and pixels that rows and columns are moved by."""

AS_IT_IS: tuple[Change, ...] = ((1.0, 0, 0),)
AUGMENTED: tuple[Change, ...] = ((1.0, 0, 0), (1.0, 3, 5), (1.0, -5, -3), (0.85, 2, -4), (1.15, -2, 4))
"""Test-time augmentation: within the ranges of the training's, and without flips."""


class Ensemble(L.LightningModule):
    """Mean probabilities of its members over all changes of what they see.

    Args:
        members: Methods with the same organs, grid and kind of network; their weights and normalisation may differ.
        changes: With each of which each of them sees a scan.

    Raises:
        UsageError: If the members do not fit together.
    """

    def __init__(self, members: Sequence[SegmentationModule], changes: Sequence[Change] = AS_IT_IS) -> None:
        super().__init__()
        first = members[0]
        for number, member in enumerate(members[1:], start=2):
            given, expected = (
                (type(one).__name__, one.organs, one.preprocessing.grid, one.preprocessing.window, _window(one))
                for one in (member, first)
            )
            if given != expected:
                raise UsageError(f"checkpoint {number} does not fit the first: found {given}, expected {expected}")
        self.members = nn.ModuleList(members)
        self.changes = tuple(changes)
        self.organs = first.organs
        self.preprocessing = first.preprocessing
        self.keep: Callable[[int, Tensor], None] | None = None
        self._centres: list[Tensor | None] = [None] * len(members)
        """Of each member, [K, 3] mm: where it takes the organs of the case to be that is being segmented."""

    def setup(self, stage: str) -> None:
        """The members compute in the trainer's precision."""
        for member in self._methods():
            member.trainer = self.trainer

    def probabilities(self, view: View) -> Tensor:
        """Images [B, 1, *S], normalised as for the first member -> mean probabilities [B, C, *S], fp32."""
        total: Tensor | None = None
        for member, centre in zip(self._methods(), self._centres, strict=True):
            own = self._renormalised(view["image"], member)
            if centre is not None:
                view = {**view, "centre": centre.to(view["centre"]).expand(len(own), -1, -1)}
            for gain, down, across in self.changes:
                seen: View = {
                    **view,
                    "image": shifted(gain * own, down, across),
                    "index_to_mm": moved(view["index_to_mm"], down, across),
                }
                probs = shifted(member.probabilities(seen), -down, -across)
                total = probs if total is None else total + probs
        assert total is not None
        return total / (len(self.members) * len(self.changes))

    def segment(self, case: WholeCase, keep: Callable[[int, Tensor], None] | None = None) -> NDArray[np.uint8]:
        """Labels [Z, Y, X] on the case's wanted grid."""
        self._centres = [self._found_by(member, case) for member in self._methods()]
        first = self._methods()[0]
        return first.sweep(case, self.probabilities, first.decide, keep)

    def predict_step(self, case: WholeCase | None, batch_idx: int) -> NDArray[np.uint8] | None:
        """Labels [Z, Y, X] in the input's own geometry (LPS); None for an input that was refused."""
        return None if case is None else self.segment(case, self.keep)

    def transfer_batch_to_device(self, batch: WholeCase | None, device: torch.device, dataloader_idx: int) -> object:
        """Whole cases stay where they are: their slabs travel."""
        return batch

    def _methods(self) -> list[SegmentationModule]:
        return [cast("SegmentationModule", member) for member in self.members]

    def _found_by(self, member: SegmentationModule, case: WholeCase) -> Tensor | None:
        """Centres [K, 3] mm by the member's own rules."""

        def normalise(values: NDArray[Any]) -> NDArray[np.float32]:
            return self._renormalised(torch.from_numpy(case.normalise(values)), member).numpy()

        floor = float(self._renormalised(torch.tensor(case.floor), member))
        centres = member.centres_of(replace(case, normalise=normalise, floor=floor))
        return None if centres is None else torch.from_numpy(centres)

    def _renormalised(self, image: Tensor, member: SegmentationModule) -> Tensor:
        """The image as this member's training cases were normalised; MR is normalised by itself."""
        theirs, ours = member.preprocessing.normalisation, self.preprocessing.normalisation
        if theirs is None or ours is None or theirs == ours:
            return image
        return (image * ours.std + (ours.mean - theirs.mean)) / theirs.std


def shifted(image: Tensor, down: int, across: int) -> Tensor:
    """[B, C, *S] moved by rows and columns; what comes in from outside repeats the edge."""
    for axis, shift in ((-2, down), (-1, across)):
        length = image.shape[axis]
        image = image.index_select(axis, (torch.arange(length, device=image.device) - shift).clamp(0, length - 1))
    return image


def moved(index_to_mm: Tensor, down: int, across: int) -> Tensor:
    """[B, 4, 4] of images that `shifted` moved."""
    # No matrix product: under autocast it would round positions to millimetres.
    moved = index_to_mm.clone()
    moved[..., 3] -= down * moved[..., 1] + across * moved[..., 2]
    return moved


def _window(member: SegmentationModule) -> object:
    normalisation = member.preprocessing.normalisation
    return normalisation and normalisation.window
