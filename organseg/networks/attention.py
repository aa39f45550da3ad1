"""Self- and cross-attention over the pixels of feature maps (METHOD.md 3.2 and 3.3; thesis, chapter 5).

Tokens are the pixels of a feature map. Legend: B cases, C channels, *S spatial axes, N their product (tokens), H heads.
Attention itself is PyTorch's fused kernel, whose memory grows linearly with N; `weights` computes the same softmax
explicitly, N x N, to look at.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from organseg.networks.unet import make_conv, make_norm, resize

_MAX_POOL: dict[int, Callable[..., Tensor]] = {2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL: dict[int, Callable[..., Tensor]] = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}

Positions = bool | Literal["rotary"]
"""Whether attention knows where its tokens are: by an encoding that is added (true), by `rotated`, or not at all."""

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, torch's first choice on an H100: of N % 128 = 64 tokens, as a bottleneck of 8 x 8 has, its backward
makes NaN as soon as attention is sharp (torch 2.11 to 2.13, pytorch/pytorch#196678)."""


def sinusoidal_positions(channels: int, size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Fixed encoding of pixel indices.

    Each axis has C / dims channels, rounded up to even: sine and cosine of index / 10000^(i / channels of the axis) for
    i = 0, 2, ... The axes' channels follow each other and are cut to C.

    Args:
        channels: C.
        size: Length of each spatial axis.
        device: Of the result.

    Returns:
        float32 [C, *size].
    """
    dims = len(size)
    per_axis = 2 * math.ceil(channels / dims / 2)
    wave = torch.exp(torch.arange(0, per_axis, 2, device=device) * (-math.log(10_000.0) / per_axis))
    axes = []
    for axis, length in enumerate(size):
        angle = wave[:, None] * torch.arange(length, device=device)
        table = torch.stack([angle.sin(), angle.cos()], dim=1).flatten(0, 1)  # sine, cosine, sine, ...
        shape = [length if other == axis else 1 for other in range(dims)]
        axes.append(table.view(per_axis, *shape).expand(per_axis, *size))
    return torch.cat(axes)[:channels]


def with_positions(image: Tensor) -> Tensor:
    """[B, C, *S] plus the encoding of its pixels."""
    return image + sinusoidal_positions(image.shape[1], image.shape[2:], image.device).to(image.dtype)


def rotated(tokens: Tensor, size: Sequence[int], grid: Sequence[int] | None = None) -> Tensor:
    """Queries or keys turned by their positions: products know how far apart two pixels are, and in which direction.

    Pairs of a head's channels are turned, by angles of periods from 2 to 32 pixels; each axis has as many pairs, and
    what is left over stays. Rotary positions (Su et al., RoFormer, Neurocomputing 2024) along each axis, as in vision
    Transformers (Heo et al., ECCV 2024); beyond the thesis.

    Args:
        tokens: [B, H, N, d].
        size: Of the map that they are of; N pixels.
        grid: Where that map is a coarser one of another: size of the other, in whose pixels positions are.

    Returns:
        [B, H, N, d].
    """
    dims, pairs = len(size), tokens.shape[-1] // 2 // len(size)
    wave = math.pi * 16.0 ** -torch.linspace(0, 1, pairs, device=tokens.device)
    angles = []
    for axis, (length, whole) in enumerate(zip(size, grid or size, strict=True)):
        index = (torch.arange(length, device=tokens.device) + 0.5) * (whole / length) - 0.5
        shape = [length if other == axis else 1 for other in range(dims)]
        angles.append((index[:, None] * wave).view(*shape, pairs).expand(*size, pairs))
    angle = torch.cat(angles, dim=-1).flatten(0, -2)
    sine, cosine = angle.sin().to(tokens.dtype), angle.cos().to(tokens.dtype)
    turned = dims * pairs
    first, second = tokens[..., :turned], tokens[..., turned : 2 * turned]
    left_over = tokens[..., 2 * turned :]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine, left_over], dim=-1)


def to_tokens(image: Tensor) -> Tensor:
    """[B, C, *S] -> [B, N, C]."""
    return image.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """[B, N, C] -> [B, C, *size]."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *size)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, H, N, C / H]: head h has the channels h C / H to (h + 1) C / H."""
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)


def join_heads(tokens: Tensor) -> Tensor:
    """[B, H, N, C / H] -> [B, N, C]."""
    return tokens.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V over keys, by the fused kernel.

    Args:
        query: [B, H, N, d].
        key: [B, H, M, d].
        value: [B, H, M, v].

    Returns:
        [B, H, N, v].
    """
    width = value.shape[-1]
    # With narrower values the fused kernels refuse, and all N x M weights would be held; zeros cost less.
    value = F.pad(value, (0, max(0, query.shape[-1] - width)))
    with sdpa_kernel(_KERNELS):
        return F.scaled_dot_product_attention(query, key, value)[..., :width]


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """The softmax inside `attend`: [B, H, N, d], [B, H, M, d] -> float32 [B, H, N, M], each row of N sums to 1."""
    with torch.autocast(query.device.type, enabled=False):  # it would round the scores, and float16 overflows
        scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
        return scores.softmax(dim=-1)


def _refuse_uneven(channels: int, heads: int) -> None:
    if heads < 1 or channels % heads:
        msg = f"{channels} channels cannot be shared equally by {heads} heads; choose a divisor of {channels}"
        raise ValueError(msg)


def _refuse_positions(positions: Positions, channels: int, heads: int, dims: int) -> None:
    if positions not in (True, False, "rotary"):
        msg = f"positional_encoding is {positions!r}, expected true, false or rotary"
        raise ValueError(msg)
    if positions == "rotary" and channels // heads < 4 * dims:  # a single period of 2 knows no direction
        msg = (
            f"rotary positions need {4 * dims} channels a head in {dims}D, "
            f"got {channels // heads} of {channels} channels and {heads} heads; choose fewer heads"
        )
        raise ValueError(msg)


class QueryKeyNorm(nn.Module):
    """Queries and keys of unit length: their product is a cosine, times a factor that each head learns.

    Without it nothing bounds the product, and where it becomes large each pixel sees one other alone, and no gradient
    comes back. Query-key normalisation (Henry et al., EMNLP Findings 2020; Dehghani et al., Scaling vision transformers
    to 22 billion parameters, ICML 2023).

    Args:
        heads: H.
        start: The factor at the start of training.
    """

    def __init__(self, heads: int, start: float = 4.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((heads, 1, 1), start))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, N, d], [B, H, M, d] -> what `attend` makes that cosine of."""
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        return query * self.factor * math.sqrt(query.shape[-1]), key


def projection(in_channels: int, out_channels: int) -> nn.Linear:
    """A learned map of tokens, started like `torch.nn.MultiheadAttention`'s (Xavier, no bias)."""
    linear = nn.Linear(in_channels, out_channels)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class MultiHeadSelfAttention(nn.Module):
    """Every pixel of a feature map sees all others (METHOD.md 3.2): 4,198,400 parameters for 1,024 channels.

    No residual, norm or MLP around it, as in the thesis; `TransformerBlock` has them.

    Args:
        channels: C.
        heads: H; divides C.
        dims: 2 for slices, 3 for volumes.
        positional_encoding: Add the pixels' positions to the input of the attention, and nowhere else; or `rotary`, see
            `rotated`.
        qk_norm: Bound what queries and keys make together, see `QueryKeyNorm`; beyond the thesis.
    """

    def __init__(
        self, channels: int, heads: int = 8, dims: int = 2, positional_encoding: Positions = True, qk_norm: bool = False
    ) -> None:
        super().__init__()
        _refuse_uneven(channels, heads)
        _refuse_positions(positional_encoding, channels, heads, dims)
        self.heads = heads
        self.dims = dims
        self.positional_encoding = positional_encoding
        self.query = projection(channels, channels)
        self.key = projection(channels, channels)
        self.value = projection(channels, channels)
        self.out = projection(channels, channels)
        self.qk_norm = QueryKeyNorm(heads) if qk_norm else None

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, *S] -> [B, C, *S]."""
        query, key, value = self._projected(image)
        return to_map(self.out(join_heads(attend(query, key, value))), image.shape[2:])

    def weights(self, image: Tensor, rows: slice = slice(None)) -> Tensor:
        """What each pixel (or some: `rows`) attends to: [B, C, *S] -> [B, H, N, N], rows sum to 1."""
        query, key, _ = self._projected(image)
        return attention_weights(query[:, :, rows], key)

    def _projected(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if image.ndim != self.dims + 2:
            msg = f"expected [B, C, *S] with {self.dims} spatial axes, got {tuple(image.shape)}"
            raise ValueError(msg)
        tokens = to_tokens(with_positions(image) if self.positional_encoding is True else image)
        query, key, value = (split_heads(map_(tokens), self.heads) for map_ in (self.query, self.key, self.value))
        if self.positional_encoding == "rotary":
            query, key = rotated(query, image.shape[2:]), rotated(key, image.shape[2:])
        if self.qk_norm is not None:
            query, key = self.qk_norm(query, key)
        return query, key, value


class TransformerBlock(nn.Module):
    """Self-attention and an MLP, each with a norm before and a residual around it; beyond the thesis.

    Args:
        channels: C.
        heads: H; divides C.
        dims: 2 for slices, 3 for volumes.
        positional_encoding: See `MultiHeadSelfAttention`.
        qk_norm: See `MultiHeadSelfAttention`.
        expansion: Width of the MLP as a multiple of C.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 8,
        dims: int = 2,
        positional_encoding: Positions = True,
        qk_norm: bool = False,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = MultiHeadSelfAttention(channels, heads, dims, positional_encoding, qk_norm)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, expansion * channels),
            nn.GELU(),
            nn.Linear(expansion * channels, channels),
        )

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, *S] -> [B, C, *S]."""
        image = image + self.attention(self._normed(image))
        return image + to_map(self.mlp(to_tokens(image)), image.shape[2:])

    def weights(self, image: Tensor, rows: slice = slice(None)) -> Tensor:
        """What each pixel (or some: `rows`) attends to: [B, C, *S] -> [B, H, N, N], rows sum to 1."""
        return self.attention.weights(self._normed(image), rows)

    def _normed(self, image: Tensor) -> Tensor:
        return to_map(self.attention_norm(to_tokens(image)), image.shape[2:])


class MultiHeadCrossAttention(nn.Module):
    """A gate on a skip connection, made by attention among the pixels of the coarser map (METHOD.md 3.3).

    Queries and keys are the coarser map Y, values the skip S pooled to Y's resolution: what is kept of the skip at one
    place depends on the whole image. 2,625,536 parameters for 1,024 and 512 channels.

    Args:
        high: C_Y, channels of Y.
        skip: C_S, channels of S.
        heads: H; divides both.
        dims: 2 for slices, 3 for volumes.
        positional_encoding: Add the pixels' positions to what the projections of Y and S see, and nowhere else; or
            `rotary`, see `rotated`.
        keys: Pool keys and values until they are no more than this, so that the cost grows with N instead of N^2
            (beyond the thesis: the skips of fine levels have too many pixels otherwise); None keeps all.
        qk_norm: See `MultiHeadSelfAttention`.
    """

    def __init__(
        self,
        high: int,
        skip: int,
        heads: int = 8,
        dims: int = 2,
        positional_encoding: Positions = True,
        keys: int | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        _refuse_uneven(high, heads)
        _refuse_uneven(skip, heads)
        _refuse_positions(positional_encoding, high, heads, dims)
        if keys is not None and keys < 1:
            msg = f"keys is {keys}; expected at least 1, or nothing for all"
            raise ValueError(msg)
        self.heads = heads
        self.positional_encoding = positional_encoding
        self.keys = keys
        self.query = projection(high, high)
        self.key = projection(high, high)
        self.value = projection(skip, skip)
        self.conv = make_conv(dims)(skip, skip, 1)
        self.norm = make_norm("batch", skip, dims)
        self.qk_norm = QueryKeyNorm(heads) if qk_norm else None

    def forward(self, high: Tensor, skip: Tensor) -> Tensor:
        """Y [B, C_Y, *S / 2], S [B, C_S, *S] -> S times its gate."""
        return skip * self.gate(high, skip)

    def gate(self, high: Tensor, skip: Tensor) -> Tensor:
        """Y [B, C_Y, *S / 2], S [B, C_S, *S] -> Z [B, C_S, *S] in 0..1."""
        query, key, value = self._projected(high, skip)
        mixed = to_map(join_heads(attend(query, key, value)), high.shape[2:])
        gate = torch.sigmoid(self.norm(self.conv(mixed)))
        return resize(gate, skip.shape[2:])

    def weights(self, high: Tensor, skip: Tensor, rows: slice = slice(None)) -> Tensor:
        """What each pixel of Y (or some: `rows`) attends to: -> [B, H, N, M] with M keys, rows sum to 1."""
        query, key, _ = self._projected(high, skip)
        return attention_weights(query[:, :, rows], key)

    def key_size(self, size: Sequence[int]) -> list[int]:
        """Size of the map of keys for a Y of this size."""
        return list(size) if self.keys is None else fitting_size(size, self.keys)

    def _projected(self, high: Tensor, skip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coarse = high.shape[2:]
        pooled = _MAX_POOL[len(coarse)](skip, [fine // n for fine, n in zip(skip.shape[2:], coarse, strict=True)])
        if self.positional_encoding is True:
            high, pooled = with_positions(high), with_positions(pooled)
        seen, size = high, self.key_size(coarse)
        if size != list(coarse):
            average = _AVERAGE_POOL[len(coarse)]
            seen, pooled = average(seen, size), average(pooled, size)
        maps = ((self.query, high), (self.key, seen), (self.value, pooled))
        query, key, value = (split_heads(map_(to_tokens(image)), self.heads) for map_, image in maps)
        if self.positional_encoding == "rotary":
            query, key = rotated(query, coarse), rotated(key, size, coarse)
        if self.qk_norm is not None:
            query, key = self.qk_norm(query, key)
        return query, key, value


def fitting_size(size: Sequence[int], most: int) -> list[int]:
    """Halve the longest axis, rounding up, until there are at most `most` pixels."""
    smaller = list(size)
    while math.prod(smaller) > max(1, most):
        longest = smaller.index(max(smaller))
        smaller[longest] = math.ceil(smaller[longest] / 2)
    return smaller
