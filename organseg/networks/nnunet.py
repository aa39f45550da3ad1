"""nnU-Net's networks, plain and with a residual encoder (Isensee et al., Nature Methods 2021, and MICCAI 2024).

Instance norm, leaky ReLU, strided convolutions down and transposed ones up, kernels and strides by axis. What they
should be for a data set is `plan`'s job (`nnunet_plan.py`). Legend: B cases, C channels, *S spatial axes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from organseg.networks.unet import PlainSkip, crop, make_conv, make_norm, pad_to_multiple

MAX_WIDTH = {2: 512, 3: 320}
RESIDUAL_BLOCKS = (1, 3, 4, 6)
"""Of the encoder's levels; all deeper ones have as many as the last."""

Axes = Sequence[int]


class NNUNet(nn.Module):
    """An encoder and a decoder of strided convolutions.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the logits; set by the method.
        width: Channels of the first level, doubled at each up to 512 in 2D and 320 in 3D.
        depth: Levels, the bottom one included; ignored where `strides` are given.
        dims: 2 for slices, 3 for volumes.
        strides: Of each level and axis, the first level's (all 1) included; default: 1, then 2.
        kernels: Of each level and axis, odd; default: 3.
        residual: Residual blocks in the encoder, as many as `RESIDUAL_BLOCKS` says.
        deep_supervision: In training, logits of the coarser levels too (for `losses.deep_supervision`).
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 7,
        width: int = 32,
        depth: int = 6,
        dims: int = 2,
        strides: Sequence[Axes] | None = None,
        kernels: Sequence[Axes] | None = None,
        residual: bool = False,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        strides = strides or [[1] * dims] + [[2] * dims] * (depth - 1)
        kernels = kernels or [[3] * dims] * len(strides)
        _check(dims, strides, kernels, width)
        depth = len(strides)
        self.channels = channels = [min(width * 2**level, MAX_WIDTH[dims]) for level in range(depth)]
        self.strides = [math.prod(axis) for axis in zip(*strides, strict=True)]
        self.fewest = 2  # instance norm leaves nothing of one voxel
        self.encoder = nn.ModuleList()
        for level, (before, after) in enumerate(pairwise([in_channels, *channels])):
            blocks = RESIDUAL_BLOCKS[min(level, len(RESIDUAL_BLOCKS) - 1)] if residual else 1
            make = ResidualBlock if residual else PlainBlock
            first = make(before, after, kernels[level], strides[level])
            self.encoder.append(nn.Sequential(first, *(make(after, after, kernels[level]) for _ in range(blocks - 1))))
        self.bottom: nn.Module = nn.Identity()
        self.gates = nn.ModuleList(PlainSkip() for _ in range(depth - 1))
        up = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for level in reversed(range(depth - 1)):
            step = tuple(strides[level + 1])
            self.up.append(up(channels[level + 1], channels[level], step, step))  # type: ignore[arg-type]  # of `dims` numbers
            self.decoder.append(PlainBlock(2 * channels[level], channels[level], kernels[level]))
        self.deep_supervision = deep_supervision
        conv = make_conv(dims)
        # Not at the coarsest map of the decoder but one: as in nnU-Net, the lowest resolution teaches nothing.
        self.coarse_heads = nn.ModuleList(
            conv(fine, out_channels, 1) for fine in (channels[-3:0:-1] if deep_supervision else [])
        )
        self.head: nn.Module = conv(width, out_channels, 1)

    def features(self, image: Tensor) -> Tensor:
        """What the last 1 x 1 convolution sees: [B, C, *S] -> [B, width, *S], any size."""
        return crop(self._decoded(image)[-1], image.shape[2:])

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """[B, C, *S] -> logits [B, out_channels, *S].

        In training with deep supervision: logits of all levels but the coarsest, finest first, of the padded image,
        since a coarse voxel may lie across the image's edge; `losses.deep_supervision` ignores what is beyond it.
        """
        if not (self.training and self.deep_supervision):
            logits: Tensor = self.head(self.features(image))
            return logits
        *coarse, finest = self._decoded(image)
        outputs = [head(level) for head, level in zip(self.coarse_heads, coarse[1:], strict=True)]
        return [self.head(finest), *reversed(outputs)]

    def _decoded(self, image: Tensor) -> list[Tensor]:
        """The decoder's maps, coarsest first, of the padded image."""
        image = pad_to_multiple(image, self.strides, self.fewest)
        skips: list[Tensor] = []
        for block in self.encoder:
            image = block(image)
            skips.append(image)
        image = self.bottom(skips.pop())
        levels = []
        for gate, up, block in zip(self.gates, self.up, self.decoder, strict=True):
            image = block(torch.cat([gate(image, skips.pop()), up(image)], dim=1))
            levels.append(image)
        return levels


class _Unit(nn.Sequential):
    """Convolution and instance norm."""

    def __init__(self, before: int, after: int, kernel: Axes, stride: Axes) -> None:
        conv = make_conv(len(kernel))
        padding = tuple(size // 2 for size in kernel)
        super().__init__(
            conv(before, after, tuple(kernel), tuple(stride), padding),  # type: ignore[arg-type]  # of `dims` numbers
            make_norm("instance", after, len(kernel)),
        )


class PlainBlock(nn.Module):
    """Twice: convolution, instance norm, leaky ReLU; the first convolution strides."""

    def __init__(self, before: int, after: int, kernel: Axes, stride: Axes | None = None) -> None:
        super().__init__()
        once = [1] * len(kernel)
        self.first = _Unit(before, after, kernel, stride or once)
        self.second = _Unit(after, after, kernel, once)

    def forward(self, image: Tensor) -> Tensor:
        """[B, before, *S] -> [B, after, *S / stride]."""
        return F.leaky_relu(self.second(F.leaky_relu(self.first(image), inplace=True)), inplace=True)


class ResidualBlock(PlainBlock):
    """A plain block with a shortcut before the last activation: averaged over the stride, projected to its channels."""

    def __init__(self, before: int, after: int, kernel: Axes, stride: Axes | None = None) -> None:
        super().__init__(before, after, kernel, stride)
        once = [1] * len(kernel)
        self.stride = tuple(stride or once)
        self.shortcut = _Unit(before, after, once, once) if before != after else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """[B, before, *S] -> [B, after, *S / stride]."""
        pool = F.avg_pool2d if image.ndim == 4 else F.avg_pool3d
        shortcut = self.shortcut(pool(image, self.stride) if max(self.stride) > 1 else image)
        return F.leaky_relu(self.second(F.leaky_relu(self.first(image), inplace=True)) + shortcut, inplace=True)


def _check(dims: int, strides: Sequence[Axes], kernels: Sequence[Axes], width: int) -> None:
    """Refuse sizes that no network has."""
    fits = dims in MAX_WIDTH and len(strides) >= 2 and len(kernels) == len(strides) and 1 <= width <= MAX_WIDTH[dims]
    fits = fits and all(len(level) == dims and min(level) >= 1 for level in (*strides, *kernels))
    fits = fits and max(strides[0]) == 1
    if not fits or any(size % 2 == 0 for level in kernels for size in level):
        msg = (
            "NNUNet needs dims 2 or 3, at least 2 levels, as many kernels as strides, a number for each axis, first "
            f"strides of 1, odd kernels and a width of 1 to {MAX_WIDTH.get(dims)}; "
            f"got dims={dims}, strides={strides}, kernels={kernels}, width={width}"
        )
        raise ValueError(msg)
