"""The head of the confidence network (METHOD.md 1.6; thesis, Table A.1)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from organseg.networks.unet import make_conv

START = 0.95
"""Confidence everywhere before training."""


class ConfidenceHead(nn.Module):
    """Features before a network's last convolution [B, features, *S] -> confidences [B, K, *S] in 0..1, fp32.

    conv3 and relu for each hidden width, conv1 to K, sigmoid: 769,487 parameters with the default options.

    Args:
        features: Channels of the input.
        out_channels: K.
        hidden: Channels of the 3 x 3 convolutions.
        dims: 2 for slices, 3 for volumes.
    """

    def __init__(
        self, features: int = 64, out_channels: int = 7, hidden: Sequence[int] = (400, 120, 64, 64), dims: int = 2
    ) -> None:
        super().__init__()
        conv = make_conv(dims)
        widths = [features, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [conv(before, after, 3, padding=1), nn.ReLU(inplace=True)]
        last = conv(widths[-1], out_channels, 1)
        assert last.bias is not None
        # Most voxels are decided rightly: from 0.5, the first steps push so hard that the hidden layers die.
        nn.init.constant_(last.bias, math.log(START / (1 - START)))
        self.layers = nn.Sequential(*layers, last)

    def forward(self, features: Tensor) -> Tensor:
        """Confidence of each organ's decision at each voxel."""
        return torch.sigmoid(self.layers(features).float())  # in bf16, most confidences would be equal
