"""Chapter 5's method: a U-Transformer that ends in one softmax (METHOD.md 3; loss and activation are ours, 3.6)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from organseg.batch import Batch, View
from organseg.losses import marginal_loss
from organseg.methods.base import SegmentationModule, adam, build_network
from organseg.networks import UTransformer
from organseg.networks.attention import Positions


class TransformerModule(SegmentationModule):
    """K + 1 channels, channel 0 the background; cross-entropy and Dice, marginal where organs are not annotated.

    The attention's options are flat, so that a sweep can vary them by name; `mhsa: false, mhca: false` is the plain
    backbone.

    Args:
        organs: Canonical names in channel order; set by the data.
        mhsa: Self-attention in the bottleneck.
        mhca: Cross-attention at the skips.
        levels: Skips that have it, from the deepest on.
        heads: Of every attention.
        positional_encoding: Whether attention knows where its tokens are: by sines (true), `rotary`, or false.
        qk_norm: Keep attention from becoming too sharp to learn (beyond the thesis).
        network: Further arguments of `UTransformer`: backbone, width, depth, dims, options, block, keys.
        optimizer: Makes the optimiser from the parameters.
        lr_decay: Learning rate at the last step as a share of the first.
        dice: Weight of the Dice term.
        channels_last: Memory format of the network.
    """

    def __init__(
        self,
        organs: Sequence[str],
        mhsa: bool = True,
        mhca: bool = True,
        levels: int = 3,
        heads: int = 8,
        positional_encoding: Positions = True,
        qk_norm: bool = False,
        network: Mapping[str, Any] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = adam,
        lr_decay: float = 0.1,
        dice: float = 1.0,
        channels_last: bool = True,
    ) -> None:
        attention: dict[str, Any] = {
            "mhsa": mhsa,
            "mhca": mhca,
            "levels": levels,
            "heads": heads,
            "positional_encoding": positional_encoding,
            "qk_norm": qk_norm and (mhsa or mhca),
        }

        def attending(in_channels: int, out_channels: int) -> nn.Module:
            return UTransformer(in_channels, out_channels, **attention, **(network or {}))

        built = build_network(attending, 1, len(organs) + 1)
        super().__init__(organs, built, optimizer, lr_decay, channels_last)
        self.dice = dice

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Marginal cross-entropy and Dice, normalised over all ranks."""
        return marginal_loss(logits, batch["label"], batch["annotated"], dice=self.dice, all_sum=self.all_sum)

    def activate(self, logits: Tensor, view: View) -> Tensor:
        """Softmax."""
        return torch.softmax(logits, dim=1)

    def decide(self, probs: Tensor) -> Tensor:
        """The most probable channel."""
        return probs.argmax(dim=1)
