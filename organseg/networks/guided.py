"""A network that is shown further maps beside its image, as channels or at its bottleneck (thesis, 6.2).

Both start as the plain network: what is added to a trained one has weights of zero, so that its training can go on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from organseg.networks.unet import make_conv, pad_to_multiple

NetworkFactory = Callable[[int, int], nn.Module]


class MapsAtBottom(nn.Module):
    """What was at the bottleneck, plus a 1 x 1 convolution of the maps there.

    Args:
        before: The bottleneck.
        maps: Their number.
        channels: Of the bottleneck.
        strides: Voxels of the input for one at the bottleneck, of each axis.
    """

    maps: Tensor | None = None
    """[B, maps, *S] of the image that the network is seeing."""

    def __init__(self, before: nn.Module, maps: int, channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.before = before
        self.strides = strides
        self.entry = make_conv(len(strides))(maps, channels, 1)
        for parameter in self.entry.parameters():
            nn.init.zeros_(parameter)

    def forward(self, deepest: Tensor) -> Tensor:
        """[B, channels, *S / 2^levels] -> the same."""
        assert self.maps is not None
        pool: Any = F.adaptive_avg_pool2d if deepest.ndim == 4 else F.adaptive_avg_pool3d
        # The network pads its input to whole strides: the maps must lie under it as the image does.
        padded = [n * stride for n, stride in zip(deepest.shape[2:], self.strides, strict=True)]
        coarse: Tensor = pool(pad_to_multiple(self.maps, padded), deepest.shape[2:])
        result: Tensor = self.before(deepest) + self.entry(coarse.to(deepest.dtype))
        return result


class MapsAtBottleneck(nn.Module):
    """A U-shaped network whose input's further channels enter at its bottleneck.

    Args:
        network: Makes it from (in_channels, out_channels); it has `bottom` and `channels`, or a `backbone` that does.
        maps: Number of further channels.
        out_channels: Channels of the logits.
    """

    def __init__(self, network: NetworkFactory, maps: int, out_channels: int) -> None:
        super().__init__()
        plain: Any = network(1, out_channels)
        self.head = plain.head
        plain.head = nn.Identity()
        unet = _unet_of(plain)
        if not hasattr(unet, "bottom") or not hasattr(unet, "channels") or len(getattr(unet, "coarse_heads", ())):
            msg = (
                f"maps enter at the bottleneck of a UNet, or of an NNUNet with `deep_supervision: false`, also with "
                f"attention in it, not of {type(plain).__name__}"
            )
            raise ValueError(msg)
        unet.bottom = MapsAtBottom(unet.bottom, maps, unet.channels[-1], unet.strides)
        self.plain: Any = plain

    def features(self, image: Tensor) -> Tensor:
        """[B, 1 + maps, *S] -> [B, width, *S]."""
        _unet_of(self.plain).bottom.maps = image[:, 1:]
        features: Tensor = self.plain.features(image[:, :1])
        return features

    def forward(self, image: Tensor) -> Tensor:
        """[B, 1 + maps, *S] -> logits [B, out_channels, *S]."""
        logits: Tensor = self.head(self.features(image))
        return logits


def _unet_of(network: Any) -> Any:
    """The network with `bottom` and `channels`: itself, or what attention was put into."""
    return network.backbone if hasattr(network, "backbone") else network


def go_on_from(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a network that sees further maps the weights of the plain one; what the maps enter by becomes zero.

    Args:
        network: The plain one itself, one with more input channels, or `MapsAtBottleneck`.
        weights: State of the plain one.

    Raises:
        RuntimeError: If it is another network.
    """
    own = network.state_dict()
    taken = {}
    for name, value in own.items():
        plain = name.removeprefix("plain.").replace("bottom.before.", "bottom.")
        if ".bottom.entry." in name:
            taken[name] = torch.zeros_like(value)
        elif plain not in weights:
            msg = f"it has no {plain}"
            raise RuntimeError(msg)
        else:
            taken[name] = _widened(weights[plain], value)
    unused = len(weights) - sum(".bottom.entry." not in name for name in own)
    if unused:
        msg = f"it has {unused} more weights"
        raise RuntimeError(msg)
    network.load_state_dict(taken)


def _widened(weight: Tensor, wanted: Tensor) -> Tensor:
    """A convolution's weight with further input channels of zero."""
    if weight.shape == wanted.shape or weight.ndim < 3 or weight.shape[1] >= wanted.shape[1]:
        return weight
    wide = torch.zeros_like(wanted)
    wide[:, : weight.shape[1]] = weight
    return wide
