"""`CrossFittedConfidence`: two networks of half the annotations each judge what the network of all of them found.

A network makes few errors where it was trained, so a confidence learned there (METHOD.md 1.6) hardly sees the errors
that it has to find, and the network itself is as sure of them as of the rest. The judges have not been trained on the
same annotations: an error of one is rarely an error of the others too, as in any committee (Seung et al., Query by
committee, COLT 1992; Lakshminarayanan et al., Deep ensembles, NeurIPS 2017). They never see a pseudo-label, so they are
trained once, before round 1, and errors that a later round feeds itself do not convince them.
"""

from collections.abc import Callable, Mapping

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor

from organseg.batch import IGNORE, Batch, Segmenter, View
from organseg.curriculum.scores import Score, Scorer
from organseg.errors import UsageError
from organseg.methods.base import SegmentationModule


class CrossFittedConfidence(Score):
    """The mean probability of the network and of two judges.

    Args:
        steps: Optimiser steps of the judges' training; both learn in each step.
    """

    once = True

    def __init__(self, steps: int = 500) -> None:
        if steps < 1:
            raise UsageError(f"confidence: steps {steps}: expected a positive number")
        self.steps = steps

    def learner(
        self,
        method: Segmenter,
        fresh: Callable[[], SegmentationModule],
        annotated: Mapping[str, NDArray[np.bool_]],
    ) -> "Judges":
        """Two segmentations with new weights; where there is a prior, it is the method's, of all annotations."""
        judges = Judges(fresh(), fresh(), halves(annotated))
        for judge in (judges.first, judges.second):
            judge.take_over(method)
        return judges

    def scorer(self, method: Segmenter, learner: L.LightningModule | None) -> Scorer:
        """Probabilities of the method, and means over the three networks."""
        assert isinstance(learner, Judges)
        judges = learner

        def score(view: View) -> Tensor:
            probs = method.organ_probabilities(view)
            others = judges.first.organ_probabilities(view) + judges.second.organ_probabilities(view)
            return torch.cat([probs, (probs + others) / 3], dim=1)

        return score


def halves(annotated: Mapping[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.bool_]]:
    """Divide each organ's annotated cases in two, as equally as possible.

    Args:
        annotated: Case key -> [K] organs that it annotates.

    Returns:
        Case key -> [K] whether the organ's annotation is of the first half; by the order of the keys, every other one.
    """
    keys = sorted(annotated)
    known = np.array([annotated[key] for key in keys])
    first = known & (known.cumsum(axis=0) % 2 == 1)
    return dict(zip(keys, first, strict=True))


def seen(label: Tensor, annotated: Tensor) -> Tensor:
    """Set the voxels of organs that are not annotated to 0, as `ambiguity_map` expects it.

    Args:
        label: [B, *S] uint8, 0..K or 255.
        annotated: [B, K] bool.
    """
    table = torch.zeros(len(label), 256, dtype=label.dtype, device=label.device)
    values = torch.arange(1, annotated.shape[1] + 1, dtype=label.dtype, device=label.device)
    table[:, 1 : annotated.shape[1] + 1] = values * annotated
    table[:, IGNORE] = IGNORE
    return table.gather(1, label.flatten(1).long()).view_as(label)


class Judges(L.LightningModule):
    """Two segmentations, trained together on two halves of the annotations.

    Args:
        first: With new weights.
        second: With other new weights.
        first_half: Case key -> [K] whether `first` sees the organ's annotation there; `second` sees the others.
    """

    def __init__(
        self, first: SegmentationModule, second: SegmentationModule, first_half: Mapping[str, NDArray[np.bool_]]
    ) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.first_half = first_half

    def on_fit_start(self) -> None:
        """Each begins with its own weights."""
        for judge in (self.first, self.second):
            judge.begin(afresh=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of both losses, each on its half; multiplied by the world size because DDP averages gradients."""
        half = torch.from_numpy(np.stack([self.first_half[case] for case in batch["case"]])).to(self.device)
        loss = torch.zeros((), device=self.device)
        for judge, share in ((self.first, half), (self.second, ~half)):
            annotated = batch["annotated"] & share
            visible: Batch = {**batch, "label": seen(batch["label"], annotated), "annotated": annotated}
            loss = loss + judge.batch_loss(visible)
        self.log("confidence/loss", loss.detach(), prog_bar=True, batch_size=len(half))
        return loss * self.trainer.world_size

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The method's own optimiser, over both networks."""
        optimizer = self.first.optimizer([*self.first.network.parameters(), *self.second.network.parameters()])
        steps, share = self.trainer.max_steps, self.first.lr_decay
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share ** (step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}
