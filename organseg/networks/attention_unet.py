"""Attention U-Net: additive, pixel-wise gates at every skip (METHOD.md 3.4 and 5; Oktay et al., MIDL 2018).

Its gates look at one pixel of the coarser map at a time: what a rival of attention over the whole image can do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from organseg.networks.unet import UNet, make_conv, resize


class AdditiveGate(nn.Module):
    """sigmoid(psi relu(W_y y + W_s s)): one number in 0..1 for each pixel of a skip.

    Args:
        high: Channels of the coarser map.
        skip: Channels of the skip.
        dims: 2 for slices, 3 for volumes.
    """

    def __init__(self, high: int, skip: int, dims: int = 2) -> None:
        super().__init__()
        conv = make_conv(dims)
        hidden = max(1, skip // 2)
        self.from_high = conv(high, hidden, 1)
        self.from_skip = conv(skip, hidden, 2, stride=2, bias=False)  # from_high has the bias of the sum
        self.to_gate = conv(hidden, 1, 1)

    def forward(self, high: Tensor, skip: Tensor) -> Tensor:
        """Coarser map [B, C_Y, *S / 2], skip [B, C_S, *S] -> skip times its gate."""
        return skip * self.gate(high, skip)

    def gate(self, high: Tensor, skip: Tensor) -> Tensor:
        """Coarser map [B, C_Y, *S / 2], skip [B, C_S, *S] -> [B, 1, *S] in 0..1."""
        gate = torch.sigmoid(self.to_gate(F.relu(self.from_high(high) + self.from_skip(skip))))
        return resize(gate, skip.shape[2:])


class AttentionUNet(UNet):
    """A U-Net with an `AdditiveGate` at every skip; its arguments are `UNet`'s."""

    def gate_between(self, high: int, skip: int, dims: int) -> nn.Module:
        """An additive gate."""
        return AdditiveGate(high, skip, dims)
