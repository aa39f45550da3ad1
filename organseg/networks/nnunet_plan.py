"""Sizes of an nnU-Net from a data set's fingerprint and a memory budget (after Isensee et al., 2021; METHOD.md 3).

The patch is as large as fits, in the proportions of the median case; an axis is halved as long as it stays at least
`SMALLEST` long and is not more than twice as coarse as the finest; a kernel does not reach across an axis that is much
coarser than the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from organseg.networks.nnunet import MAX_WIDTH, RESIDUAL_BLOCKS

SMALLEST = 4
"""Of a map of the bottom level, in each axis that was halved."""

MAPS = 8
"""Feature maps of each level's width that a training step holds beside those of the encoder's blocks: 6 of the decoder
are kept for the backward pass (tests/networks/test_nnunet_plan.py counts all that is), the rest is in flight there."""

BLOCK_MAPS = 4
"""Likewise, of each block of the encoder."""

SHORTCUT_MAPS = 2
"""Likewise, of each level's projected shortcut, where the encoder is residual."""

ATTENTION_MAPS = 6
"""Likewise, of self-attention in the bottleneck and of cross-attention at each skip."""

ATTENTION_LEVELS = 4
"""The bottleneck and the three deepest skips."""

LOSS_BYTES = 36
"""Of each channel and voxel of the logits: the loss computes in fp32 and keeps 25 bytes, the rest is in flight."""

WEIGHT_BYTES = 16
"""Of a weight, its gradient and the optimiser's two means."""

OVERHEAD_GB = 0.5
"""Workspace and what the libraries take."""


@dataclass(frozen=True)
class Training:
    """What is trained, as far as memory depends on it.

    Attributes:
        width: Channels of the first level.
        channels: Of the logits.
        residual: Whether the encoder is residual.
        attention: Whether it is the backbone of a U-Transformer.
        value_bytes: Of a value of a feature map: 2 in mixed precision, 4 in fp32.
    """

    width: int = 32
    channels: int = 1
    residual: bool = False
    attention: bool = False
    value_bytes: int = 2


@dataclass(frozen=True)
class NetworkPlan:
    """What a config needs.

    Attributes:
        patch_size: Voxels of each axis.
        batch_size: Patches.
        strides: Of each level and axis, as `NNUNet` takes them.
        kernels: Likewise.
        memory_gb: Estimated, in training.
    """

    patch_size: tuple[int, ...]
    batch_size: int
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    memory_gb: float


def plan(
    shape: Sequence[int],
    spacing: Sequence[float],
    memory_gb: float,
    training: Training,
    least_batch: int = 2,
    whole: bool = False,
) -> NetworkPlan:
    """Choose the sizes.

    Args:
        shape: Of the median case, 2 or 3 axes.
        spacing: mm of the same axes.
        memory_gb: Budget of a training step.
        training: What is trained.
        least_batch: Patches that must fit at once.
        whole: The network sees images of exactly this shape (slices): nothing is cut off or padded.

    Raises:
        ValueError: If not even the smallest patch fits.
    """
    width = training.width
    if not 1 <= width <= MAX_WIDTH[len(shape)] or not memory_gb > 0:
        msg = f"width {width} and memory {memory_gb} GB: expected 1 to {MAX_WIDTH[len(shape)]}, and more than nothing"
        raise ValueError(msg)
    patch = list(shape)
    while True:
        found = _topology(patch, spacing, whole)
        strides = found[0]
        padded = [max(size, _round_up(n, size)) for n, size in zip(patch, _total(strides), strict=True)]
        if memory_of(padded, strides, training, least_batch) <= memory_gb:
            break
        # The axis that is longest compared with the case gives way, by one step of its strides.
        smaller = [n - step for n, step in zip(padded, _total(strides), strict=True)]
        axes = [axis for axis, n in enumerate(smaller) if n >= 2 * SMALLEST and not whole]
        if not axes:
            msg = f"nothing of {least_batch} fits into {memory_gb} GB with width {width}; choose a smaller width"
            raise ValueError(msg)
        axis = max(axes, key=lambda a: (patch[a] / shape[a], patch[a]))
        patch[axis] = smaller[axis]
    batch = least_batch
    while memory_of(padded, strides, training, batch + 1) <= memory_gb and batch < 64:
        batch += 1
    return NetworkPlan(tuple(padded), batch, strides, found[1], memory_of(padded, strides, training, batch))


def _topology(
    patch: Sequence[int], spacing: Sequence[float], whole: bool
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Strides and kernels for a patch."""
    size, step = list(patch), list(spacing)
    strides = [(1,) * len(size)]
    kernels = [_kernel(step)]
    while True:
        room = [n >= 2 * SMALLEST and not (whole and n % 2) for n in size]
        finest = min((mm for mm, fits in zip(step, room, strict=True) if fits), default=0.0)
        halved = [fits and mm <= 2 * finest for mm, fits in zip(step, room, strict=True)]
        if not any(halved):
            return tuple(strides), tuple(kernels)
        strides.append(tuple(2 if half else 1 for half in halved))
        size = [math.ceil(n / stride) for n, stride in zip(size, strides[-1], strict=True)]
        step = [mm * stride for mm, stride in zip(step, strides[-1], strict=True)]
        # An axis that kernels have reached across stays so: a strided kernel of 1 would skip what lies between.
        wide = [before == 3 or stride > 1 for before, stride in zip(kernels[-1], strides[-1], strict=True)]
        kernels.append(tuple(3 if far else near for far, near in zip(wide, _kernel(step), strict=True)))


def _kernel(step: Sequence[float]) -> tuple[int, ...]:
    return tuple(1 if mm > 2 * min(step) else 3 for mm in step)


def memory_of(patch: Sequence[int], strides: Sequence[Sequence[int]], training: Training, batch: int) -> float:
    """Estimated gigabytes of a training step."""
    dims, depth = len(patch), len(strides)
    voxels, values, logits, weights = float(math.prod(patch)), 0.0, 0.0, 0.0
    for level, stride in enumerate(strides):
        voxels /= math.prod(stride)
        width = min(training.width * 2**level, MAX_WIDTH[dims])
        blocks = RESIDUAL_BLOCKS[min(level, len(RESIDUAL_BLOCKS) - 1)] if training.residual else 1
        maps = MAPS + BLOCK_MAPS * blocks + SHORTCUT_MAPS * training.residual
        maps += ATTENTION_MAPS * (training.attention and level >= depth - ATTENTION_LEVELS)
        values += maps * width * voxels
        logits += training.channels * voxels * (level < max(1, depth - 2))  # with deep supervision
        # Two convolutions a block, and two in the decoder, of which the first sees the skip too.
        weights += (2 * blocks + 3) * width**2 * 3**dims
    used = weights * WEIGHT_BYTES + batch * (values * training.value_bytes + logits * LOSS_BYTES)
    return OVERHEAD_GB + used / 1e9


def _total(strides: Sequence[Sequence[int]]) -> list[int]:
    return [math.prod(axis) for axis in zip(*strides, strict=True)]


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
