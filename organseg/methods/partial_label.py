"""INERRANT's first stage and its naive baseline (METHOD.md 1.1 to 1.3).

K binary classifiers, each judged only where the truth of its organ is known.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from organseg.batch import Batch, View
from organseg.losses import Balance, partial_label_loss
from organseg.methods.base import NetworkFactory, SegmentationModule, adam, build_network
from organseg.networks import UNet

PRIOR = 0.01
"""Probability of each organ that training starts from: most voxels belong to none."""


def start_at_prior(head: nn.Module) -> None:
    """Set the last layer's bias so that a new network predicts `PRIOR` everywhere.

    From 0.5, the first hundreds of steps only push every organ down, and small ones are slow to come back (Lin et al.,
    Focal loss for dense object detection, ICCV 2017, section 4.1).
    """
    assert isinstance(head.bias, Tensor)
    nn.init.constant_(head.bias, math.log(PRIOR / (1 - PRIOR)))


class PartialLabelModule(SegmentationModule):
    """One sigmoid an organ, trained with `partial_label_loss`.

    Args:
        organs: Canonical names in channel order; set by the data.
        network: Makes the network from (in_channels, out_channels).
        optimizer: Makes the optimiser from the parameters.
        lr_decay: Learning rate at the last step as a share of the first.
        naive: Train as if everything unlabelled were background (the baseline that fails).
        balance: See `partial_label_loss`.
        dice: See `partial_label_loss`.
        channels_last: Memory format of the network.
    """

    def __init__(
        self,
        organs: Sequence[str],
        network: NetworkFactory = UNet,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = adam,
        lr_decay: float = 0.1,
        naive: bool = False,
        balance: Balance = "organ",
        dice: float = 1.0,
        channels_last: bool = True,
    ) -> None:
        super().__init__(organs, build_network(network, 1, len(organs)), optimizer, lr_decay, channels_last)
        start_at_prior(self.network.head)
        for name, module in self.network.named_modules():
            if "coarse_heads." in name:
                start_at_prior(module)
        self.naive = naive
        self.balance: Balance = balance
        self.dice = dice

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """METHOD.md 1.2, normalised over all ranks."""
        return partial_label_loss(
            logits,
            batch["label"],
            batch["annotated"],
            naive=self.naive,
            balance=self.balance,
            dice=self.dice,
            all_sum=self.all_sum,
        )

    def activate(self, logits: Tensor, view: View) -> Tensor:
        """Sigmoid."""
        return torch.sigmoid(logits)

    def decide(self, probs: Tensor) -> Tensor:
        """The most probable organ where its probability is at least 0.5, else background."""
        best, channel = probs.max(dim=1)
        return torch.where(best >= 0.5, channel + 1, 0)
