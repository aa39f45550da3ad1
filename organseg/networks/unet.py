"""U-Net as the thesis uses it (METHOD.md 3.1; thesis, Table A.1), in 2D or 3D.

Plain modules, no Lightning, no organs. Any input size: it is padded with its edge values to a multiple of the stride
and the output cropped back. Legend: B cases, C channels, *S spatial axes.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["batch", "instance", "group"]
NormAfter = Literal["block", "convolution"]


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` whose smallest maps are computed in fp32 on CPUs.

    In torch 2.13, oneDNN's bf16 kernels return uninitialised memory as weight gradients (up to 1e38) where the first
    spatial axis is 2 long, and wrong values where strides lead to a last axis of 1 (pytorch#169688).
    """

    def forward(self, image: Tensor) -> Tensor:
        """[B, in, D, H, W] -> [B, out, D', H', W']."""
        if image.is_cpu and min(image.shape[2:]) <= 2:
            with torch.autocast("cpu", enabled=False):
                return super().forward(image.float())
        return super().forward(image)


_CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: Conv3d}
_POOL: dict[int, type[nn.MaxPool2d] | type[nn.MaxPool3d]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_NORM: dict[tuple[str, int], type[nn.Module]] = {
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
}


def make_conv(dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution of 2 or 3 spatial axes."""
    return _CONV[dims]


def make_norm(norm: Norm, channels: int, dims: int) -> nn.Module:
    """A normalisation layer with learned scale and shift."""
    if norm == "group":
        return nn.GroupNorm(gcd(8, channels), channels)
    return _NORM[norm, dims](channels, affine=True)


class ConvBlock(nn.Sequential):
    """conv3, relu, conv3, norm, relu: [B, in, *S] -> [B, out, *S].

    `norm_after="convolution"` puts a norm after both convolutions; `last_norm=False` (the network's last block in Table
    A.1) leaves out the block's own.
    """

    def __init__(
        self, in_channels: int, out_channels: int, dims: int, norm: Norm, norm_after: NormAfter, last_norm: bool = True
    ) -> None:
        conv = _CONV[dims]
        everywhere = norm_after == "convolution"
        layers: list[nn.Module] = [conv(in_channels, out_channels, 3, padding=1)]
        if everywhere:
            layers.append(make_norm(norm, out_channels, dims))
        layers += [nn.ReLU(inplace=True), conv(out_channels, out_channels, 3, padding=1)]
        if everywhere or last_norm:
            layers.append(make_norm(norm, out_channels, dims))
        layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class UpBlock(nn.Module):
    """Nearest upsampling by 2, conv2 ('same': one zero after the last row and column), norm, relu."""

    def __init__(self, in_channels: int, out_channels: int, dims: int, norm: Norm) -> None:
        super().__init__()
        self.padding = (0, 1) * dims
        self.conv = _CONV[dims](in_channels, out_channels, 2)
        self.norm = make_norm(norm, out_channels, dims)

    def forward(self, image: Tensor) -> Tensor:
        """[B, in, *S] -> [B, out, *2S]."""
        up = F.interpolate(image, scale_factor=2, mode="nearest")
        result: Tensor = F.relu(self.norm(self.conv(F.pad(up, self.padding))), inplace=True)
        return result


class PlainSkip(nn.Module):
    """A skip connection that passes everything on; attention puts a gate in its place."""

    def forward(self, high: Tensor, skip: Tensor) -> Tensor:
        """Coarser map [B, C_Y, *S / 2] and skip [B, C_S, *S] -> skip."""
        return skip


class UNet(nn.Module):
    """The encoder-decoder of Table A.1: 31,038,663 parameters with the default options.

    `bottom` is applied to the deepest map and `gates` to the skips, deepest first; here they do nothing, attention
    networks put theirs in their places. `channels` are those of each level, finest first; `strides` the voxels of the
    input for one of the deepest map, of each axis; `fewest` the voxels that this map has at least.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the logits; K for sigmoids, K + 1 for a softmax. Set by the method.
        width: Channels of the first block, doubled at each level.
        depth: Levels, the bottom one included.
        dims: 2 for slices, 3 for volumes.
        norm: Kind of normalisation.
        norm_after: `block` as in the thesis, or `convolution` (protocol S: after every one).
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 7,
        width: int = 64,
        depth: int = 5,
        dims: int = 2,
        norm: Norm = "batch",
        norm_after: NormAfter = "block",
    ) -> None:
        super().__init__()
        if dims not in _CONV or depth < 2 or width < 1:
            msg = f"UNet needs dims 2 or 3, depth >= 2 and width >= 1, got dims={dims}, depth={depth}, width={width}"
            raise ValueError(msg)
        self.channels = channels = [width * 2**level for level in range(depth)]
        self.strides = [2 ** (depth - 1)] * dims
        self.fewest = 2 if norm == "instance" else 1
        self.encoder = nn.ModuleList(
            ConvBlock(before, after, dims, norm, norm_after) for before, after in pairwise([in_channels, *channels])
        )
        self.pool = _POOL[dims](2)
        self.bottom: nn.Module = nn.Identity()
        deepest_first = pairwise(channels[::-1])
        self.gates = nn.ModuleList(self.gate_between(high, skip, dims) for high, skip in deepest_first)
        self.up = nn.ModuleList(UpBlock(deep, fine, dims, norm) for fine, deep in reversed(list(pairwise(channels))))
        self.decoder = nn.ModuleList(
            ConvBlock(2 * fine, fine, dims, norm, norm_after, last_norm=fine > width) for fine in channels[-2::-1]
        )
        self.head: nn.Module = make_conv(dims)(width, out_channels, 1)

    def gate_between(self, high: int, skip: int, dims: int) -> nn.Module:
        """What a skip of so many channels goes through, given those of the coarser map."""
        return PlainSkip()

    def features(self, image: Tensor) -> Tensor:
        """What the last 1 x 1 convolution sees: [B, C, *S] -> [B, width, *S], any size."""
        *skips, deepest = self.encode(pad_to_multiple(image, self.strides, self.fewest))
        return crop(self.decode(self.bottom(deepest), skips), image.shape[2:])

    def encode(self, image: Tensor) -> list[Tensor]:
        """The maps of all levels, finest first; the strides divide the image's size."""
        maps: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            image = block(self.pool(image) if level else image)
            maps.append(image)
        return maps

    def decode(self, bottom: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """The deepest map and the skips, finest first -> [B, width, *S]."""
        image = bottom
        for gate, up, block, skip in zip(self.gates, self.up, self.decoder, reversed(skips), strict=True):
            image = block(torch.cat([gate(image, skip), up(image)], dim=1))
        return image

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, *S] -> logits [B, out_channels, *S]."""
        logits: Tensor = self.head(self.features(image))
        return logits


def crop(image: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` indices of the spatial axes of [B, C, *S]."""
    for axis, length in enumerate(size, start=2):
        image = image.narrow(axis, 0, length)
    return image


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation of [B, C, *S] to another size; stays within the values' range."""
    mode = "bilinear" if image.ndim == 4 else "trilinear"
    return F.interpolate(image, tuple(size), mode=mode, align_corners=False)


def multiple_of(size: Sequence[int], multiples: Sequence[int], fewest: int = 1) -> list[int]:
    """The next larger size that the multiples divide.

    Args:
        size: Length of each spatial axis.
        multiples: Likewise.
        fewest: Multiples that fit into it, over all axes: instance norm needs two voxels of the deepest map.
    """
    counts = [-(-n // multiple) for n, multiple in zip(size, multiples, strict=True)]
    if prod(counts) < fewest:
        counts[-1] = fewest
    return [count * multiple for count, multiple in zip(counts, multiples, strict=True)]


def pad_to_multiple(image: Tensor, multiples: Sequence[int], fewest: int = 1) -> Tensor:
    """Repeat the edge after the last index of each spatial axis up to the size of `multiple_of`; [B, C, *S]."""
    size = multiple_of(image.shape[2:], multiples, fewest)
    missing = [want - have for have, want in zip(image.shape[2:], size, strict=True)]
    if not any(missing):
        return image
    padding = [side for n in reversed(missing) for side in (0, n)]
    return F.pad(image, padding, mode="replicate")
