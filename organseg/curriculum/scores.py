"""Scores that rank a round's candidates: how sure is the network of a voxel that nobody annotated (METHOD.md 1.5, 1.6).

`mcp` takes the probability itself; `confidence` trains a second network, on the annotated voxels, to predict the true
class probability, and is thrown away after the relabelling. A new score is a class with the two methods of `Score`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor, nn

from organseg.batch import Batch, Segmenter, View
from organseg.errors import UsageError
from organseg.losses import confidence_loss
from organseg.methods.base import SegmentationModule
from organseg.networks import ConfidenceHead

Scorer = Callable[[View], Tensor]
"""Images [B, C, *S] -> [B, 2K, *S]: probabilities of the K organs, then their scores."""


class Score(ABC):
    """What ranks candidates."""

    steps: int = 0
    """Optimiser steps of the learner's training; 0 where nothing is learned."""
    once: bool = False
    """The learner is trained before round 1 and kept, instead of anew in each round."""

    def learner(
        self,
        method: Segmenter,
        fresh: Callable[[], SegmentationModule],
        annotated: Mapping[str, NDArray[np.bool_]],
    ) -> L.LightningModule | None:
        """What has to be trained first, on annotations alone.

        Args:
            method: The segmentation that is to be judged.
            fresh: Makes another one of its kind with new weights, different ones at each call.
            annotated: Training case -> [K] organs that it annotates.
        """
        return None

    @abstractmethod
    def scorer(self, method: Segmenter, learner: L.LightningModule | None) -> Scorer:
        """The score of voxels, from the method and the trained learner."""


class MaximumClassProbability(Score):
    """The probability of the predicted organ: no training (SMILE)."""

    def scorer(self, method: Segmenter, learner: L.LightningModule | None) -> Scorer:
        """Probabilities are their own scores."""

        def score(view: View) -> Tensor:
            probs = method.organ_probabilities(view)
            return torch.cat([probs, probs], dim=1)

        return score


class LearnedConfidence(Score):
    """A network that predicts the true class probability of each binary decision.

    Args:
        mode: `fine-tune` trains a copy of the network's features with the head, `frozen` the head alone.
        over: What it learns to judge: `positives`, the organs that the network predicts, as candidates are; or `known`,
            every decision whose truth is known (thesis). Of these nearly all are easy background, and it then is as
            sure of wrong candidates as of right ones: of BTCV's at 30% of the labels it had an AUC of 45%, the
            probability of 76% (results/relabelling).
        hidden: Channels of the head's 3 x 3 convolutions.
        steps: Optimiser steps of its training in each round.
        lr: Where its learning rate starts.
        lr_decay: Learning rate at its last step as a share of the first.
    """

    def __init__(
        self,
        mode: Literal["fine-tune", "frozen"] = "fine-tune",
        over: Literal["positives", "known"] = "positives",
        hidden: Sequence[int] = (400, 120, 64, 64),
        steps: int = 1000,
        lr: float = 1e-4,
        lr_decay: float = 0.1,
    ) -> None:
        if steps < 1 or lr <= 0 or not 0 < lr_decay <= 1:
            raise UsageError(f"confidence: steps {steps}, lr {lr}, lr_decay {lr_decay}: expected positive numbers")
        self.mode = mode
        self.over = over
        self.hidden = tuple(hidden)
        self.steps = steps
        self.lr = lr
        self.lr_decay = lr_decay

    def learner(
        self,
        method: Segmenter,
        fresh: Callable[[], SegmentationModule],
        annotated: Mapping[str, NDArray[np.bool_]],
    ) -> "ConfidenceModule":
        """The confidence network of a method."""
        return ConfidenceModule(method, self)

    def scorer(self, method: Segmenter, learner: L.LightningModule | None) -> Scorer:
        """Probabilities of the method, confidences of the learner."""
        assert isinstance(learner, ConfidenceModule)

        def score(view: View) -> Tensor:
            return torch.cat(learner.probabilities_and_confidence(view), dim=1)

        return score


class ConfidenceModule(L.LightningModule):
    """Head on a copy of the features (or on the features themselves), trained towards the true class probability.

    Args:
        method: The segmentation; it is frozen, in eval mode, and not changed.
        options: Of the network and its training.
    """

    def __init__(self, method: Segmenter, options: LearnedConfidence) -> None:
        super().__init__()
        assert isinstance(method, nn.Module)
        self.options = options
        self.method = method.requires_grad_(False).eval()
        self.features = copy.deepcopy(method.network).requires_grad_(options.mode == "fine-tune")
        channels, dims = method.network.head.in_channels, method.network.head.weight.ndim - 2
        self.features.head = nn.Identity()  # a convolution without a gradient would stop DDP,
        for name, parameter in self.features.named_parameters():
            if "coarse_heads" in name:  # and so would those of deep supervision
                parameter.requires_grad_(False)
        self.head = ConfidenceHead(channels, len(method.organs), options.hidden, dims)
        self.head.to(memory_format=method.memory_format)  # type: ignore[call-overload]  # missing in stubs

    def train(self, mode: bool = True) -> "ConfidenceModule":
        """Only what is trained leaves eval mode."""
        super().train(mode)
        self.method.eval()
        if self.options.mode == "frozen":
            self.features.eval()
        return self

    def confidence(self, view: View) -> Tensor:
        """Images [B, C, *S] -> confidences [B, K, *S], fp32."""
        confidence: Tensor = self.head(self.features.features(self.method.inputs(view)))
        return confidence

    def probabilities_and_confidence(self, view: View) -> tuple[Tensor, Tensor]:
        """What relabelling needs of a batch, in the trainer's precision."""
        probs = self.method.organ_probabilities(view)
        with self.trainer.precision_plugin.forward_context():
            return probs, self.confidence(view)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """METHOD.md 1.6, equation 3.3; multiplied by the world size because DDP averages gradients."""
        with torch.no_grad():
            probs = self.method.organ_probabilities(batch)
        loss = confidence_loss(
            self.confidence(batch),
            probs,
            batch["label"],
            batch["annotated"],
            positives=self.options.over == "positives",
            all_sum=self.method.all_sum,
        )
        self.log("confidence/loss", loss.detach(), prog_bar=True, batch_size=len(probs))
        return loss * self.trainer.world_size

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with exponential decay."""
        optimizer = torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.options.lr)
        steps, share = self.trainer.max_steps, self.options.lr_decay
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share ** (step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}
