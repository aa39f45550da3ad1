"""Convolutions see patches, attention sees the whole volume (thesis, 6.2: the 'perfect solution').

A volume is divided into patches. Each is encoded by itself; the deepest maps of all of them lie side by side and every
token attends to all others, those of far patches too; then each patch is decoded by itself. Where the patches reach
beyond the volume they are padded with its edge; tokens that see nothing else take no part in the attention. In training
nothing of a patch but its ends is kept: what is between is computed again for the gradient, so that the memory of the
convolutions is that of one patch, however large the volume.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from organseg.networks.attention import MultiHeadSelfAttention, TransformerBlock
from organseg.networks.unet import Norm, UNet, crop, multiple_of, pad_to_multiple


class HybridUNet(nn.Module):
    """A U-Net over patches with a Transformer block over the volume in its bottleneck.

    The volume is the data's `patch_size` (in 2D a slice): a whole multiple of `patch` in each axis, or its edge is
    repeated, and twice as long in some, or there is one patch alone.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the logits; set by the method.
        patch: Voxels of each axis that convolutions see; the U-Net's strides divide it, and it has more than one.
        heads: Of the attention.
        width: Channels of the first level.
        depth: Levels.
        dims: 2 for slices, 3 for volumes.
        norm: Kind of normalisation; not batch norm, whose statistics would differ between the two passes.
        block: Norms, residuals and MLP around the attention; without it a patch is decoded from the attention alone.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 7,
        patch: Sequence[int] = (32, 64, 64),
        heads: int = 8,
        width: int = 16,
        depth: int = 5,
        dims: int = 3,
        norm: Norm = "instance",
        block: bool = True,
    ) -> None:
        super().__init__()
        self.unet = UNet(in_channels, out_channels, width, depth, dims, norm, "convolution")
        self.head = self.unet.head
        self.unet.head = nn.Identity()
        strides = self.unet.strides
        if norm == "batch" or len(patch) != dims or list(patch) != multiple_of(patch, strides, self.unet.fewest):
            msg = (
                f"HybridUNet needs a patch of {dims} axes that {strides} divides, larger than that, and a norm other "
                f"than batch, got patch {tuple(patch)} and norm {norm}"
            )
            raise ValueError(msg)
        self.patch = tuple(patch)
        self.bottom: nn.Module = (TransformerBlock if block else MultiHeadSelfAttention)(
            self.unet.channels[-1], heads, dims
        )

    def features(self, image: Tensor) -> Tensor:
        """What the last 1 x 1 convolution sees: [B, C, *S] -> [B, width, *S], any size."""
        whole = pad_to_multiple(image, self.patch)  # a small remainder would have no instance to normalise over
        deep_patch = [n // stride for n, stride in zip(self.patch, self.unet.strides, strict=True)]
        deep_size = [n // stride for n, stride in zip(whole.shape[2:], self.unet.strides, strict=True)]
        deepest = _assembled(
            [_cheaply(self._encoded, part) for part in _parts(whole, self.patch)], deep_size, deep_patch
        )
        inside = [-(-n // stride) for n, stride in zip(image.shape[2:], self.unet.strides, strict=True)]
        attended = pad_to_multiple(self.bottom(crop(deepest, inside)), deep_patch)
        parts = zip(_parts(whole, self.patch), _parts(attended, deep_patch), strict=True)
        decoded = [_cheaply(self._decoded, part, deep) for part, deep in parts]
        return crop(_assembled(decoded, whole.shape[2:], self.patch), image.shape[2:])

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, *S] -> logits [B, out_channels, *S]."""
        logits: Tensor = self.head(self.features(image))
        return logits

    def _encoded(self, part: Tensor) -> Tensor:
        return self.unet.encode(part)[-1]

    def _decoded(self, part: Tensor, deepest: Tensor) -> Tensor:
        return self.unet.decode(deepest, self.unet.encode(part)[:-1])


def _cheaply(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The function's value; for a gradient it is computed again instead of kept."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False)
    return result


def _starts(size: Sequence[int], patch: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*(range(0, n, step) for n, step in zip(size, patch, strict=True)))


def _parts(image: Tensor, patch: Sequence[int]) -> Iterator[Tensor]:
    """The patches of [B, C, *S], in order; the last ones of an axis may be smaller."""
    for start in _starts(image.shape[2:], patch):
        part = image
        for axis, (first, length) in enumerate(zip(start, patch, strict=True), start=2):
            part = part.narrow(axis, first, min(length, image.shape[axis] - first))
        yield part


def _assembled(parts: Sequence[Tensor], size: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The patches put together again, axis by axis from the last."""
    rows = list(parts)
    for axis in reversed(range(len(size))):
        count = -(-size[axis] // patch[axis])
        rows = [torch.cat(rows[first : first + count], dim=axis + 2) for first in range(0, len(rows), count)]
    return rows[0]
