"""What a network looks at: attention maps of a voxel (thesis, Figure 5.8) and receptive fields (Figure 5.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor, nn

from organseg.networks import MultiHeadCrossAttention, MultiHeadSelfAttention
from organseg.networks.receptive_field import field_size
from organseg.networks.unet import multiple_of
from organseg.report.figures import new_figure, shown
from organseg.report.overlays import paint
from organseg.report.views import Slice

_PANEL = 3.0


@dataclass(frozen=True)
class AttentionMap:
    """Where one attention module looks for a voxel.

    Attributes:
        title: Of the module.
        heads: float32 [H, *S'], each head's weights over the keys; they sum to 1.
    """

    title: str
    heads: NDArray[np.float32]

    @property
    def seen(self) -> NDArray[np.float32]:
        """[H] among how many keys each head shares its weight: exp of its entropy, 1 where attention has collapsed."""
        flat = self.heads.reshape(len(self.heads), -1)
        shared: NDArray[np.float32] = np.exp(-(flat * np.log(flat + 1e-12)).sum(axis=1))
        return shared


def attention_maps(network: nn.Module, image: Tensor, voxel: Sequence[int]) -> list[AttentionMap]:
    """The maps of all attention modules of a network, in the order in which they are applied.

    Args:
        network: In eval mode, with `features`.
        image: [1, 1, *S], normalised.
        voxel: Index in S; each module's token there is asked.
    """
    found: list[AttentionMap] = []
    padded = padded_size(network, image.shape[2:])

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        size = inputs[0].shape[2:]
        token = 0
        for index, length, coarse in zip(voxel, padded, size, strict=True):
            token = token * coarse + index * coarse // length
        cross = isinstance(module, MultiHeadCrossAttention)
        rows = module.weights(*inputs, rows=slice(token, token + 1))  # type: ignore[operator]
        keys = module.key_size(size) if isinstance(module, MultiHeadCrossAttention) else list(size)
        kind = (
            f"cross-attention, skip {sum(one.title.startswith('cross') for one in found) + 1}"
            if cross
            else "self-attention"
        )
        heads = rows[0, :, 0].unflatten(1, keys).float().cpu().numpy()
        found.append(AttentionMap(f"{kind}\n{' x '.join(map(str, keys))} keys, {len(heads)} heads", heads))

    kinds = (MultiHeadSelfAttention, MultiHeadCrossAttention)
    handles = [module.register_forward_pre_hook(look) for module in network.modules() if isinstance(module, kinds)]
    try:
        with torch.inference_mode():
            network.features(image)  # type: ignore[operator]  # every network has features
    finally:
        for handle in handles:
            handle.remove()
    return found


def padded_size(network: nn.Module, size: Sequence[int]) -> list[int]:
    """Size of the image that the tokens of the network cover: its strides, if it has any, divide it."""
    inner: Any = next((part for name, part in network.named_children() if name in ("backbone", "unet")), network)
    return multiple_of(size, getattr(inner, "strides", [1] * len(size)), getattr(inner, "fewest", 1))


def draw_attention(
    view: Slice, window: tuple[float, float], voxel: Sequence[int], padded: Sequence[int], maps: Sequence[AttentionMap]
) -> Figure:
    """The slice with the voxel, and each module's attention over it: the mean of its heads, and the sharpest head.

    Titles say the highest weight, and among how many keys one head shares its weight (`AttentionMap.seen`).

    Args:
        view: The axial slice of the voxel, of the image that the network saw.
        window: Intensities to show as black and white.
        voxel: Index in that image, (y, x) or (z, y, x).
        padded: Size that the maps cover, see `padded_size`.
        maps: See `attention_maps`.
    """
    figure = new_figure(_PANEL * (len(maps) + 1), 2 * _PANEL + 1.6)
    grid = figure.subplots(2, len(maps) + 1, squeeze=False)
    (down, across), (row, column) = view.pixel_mm, voxel[-2:]
    extent = (0.0, padded[-1] * across, padded[-2] * down, 0.0)
    for line, which in zip(grid, ("mean of the heads", "sharpest head"), strict=True):
        paint(line[0], view, window, None)
        line[0].set_ylabel(which, fontsize=10)
        for axes, found in zip(line[1:], maps, strict=True):
            shown_heads = slice(None) if which.startswith("mean") else [int(found.seen.argmin())]
            weights, seen = found.heads[shown_heads].mean(axis=0), found.seen[shown_heads].mean()
            plane = weights if weights.ndim == 2 else weights[voxel[0] * len(weights) // padded[0]]
            paint(axes, view, window, None)
            axes.imshow(
                plane, cmap="inferno", extent=extent, alpha=0.6, interpolation="nearest", vmin=0, vmax=weights.max()
            )
            axes.set_xlim(0, view.image.shape[1] * across)
            axes.set_ylim(view.image.shape[0] * down, 0)
            highest = np.format_float_positional(100 * weights.max(), precision=2, fractional=False, trim="-")
            axes.set_title(f"{found.title}\nhighest {highest} %, a head sees {seen:.1f}", fontsize=9)
        for axes in line:
            axes.plot((column + 0.5) * across, (row + 0.5) * down, "+", color="cyan", markersize=12, markeredgewidth=2)
    grid[0][0].set_title("\n".join(map(shown, view.caption.splitlines())), fontsize=9)
    return figure


def draw_receptive_field(effective: Tensor, theoretical: Tensor, title: str) -> Figure:
    """The gradient of a layer's central unit, and what it could see at most.

    Args:
        effective: [*S], see `effective_receptive_field`.
        theoretical: bool [*S].
        title: Of the network and the layer.
    """
    plane, border = (field if field.ndim == 2 else field[field.shape[0] // 2] for field in (effective, theoretical))
    relative = (plane / effective.max()).numpy()
    figure = new_figure(2 * _PANEL + 2.2, _PANEL + 1.6)
    left, right = figure.subplots(1, 2)
    picture = left.imshow(np.sqrt(relative), cmap="inferno", vmin=0, vmax=1)
    figure.colorbar(picture, ax=left, label="square root of |gradient|, of its maximum", shrink=0.8)
    rows, columns = (np.flatnonzero(border.any(dim=axis).numpy()) for axis in (1, 0))
    corner, size = (columns[0] - 0.5, rows[0] - 0.5), (columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    left.add_patch(Rectangle(corner, *map(float, size), fill=False, edgecolor="cyan"))
    cut = "at least " if bool(border[0].any() or border[:, 0].any()) else ""
    left.set_title(f"cyan: theoretical field, {cut}{size[1]} x {size[0]} pixels", fontsize=9)
    right.plot(relative[relative.shape[0] // 2], color="#1f5f99", label="middle row")
    right.plot(relative[:, relative.shape[1] // 2], color="#c9661b", label="middle column")
    right.set_xlabel("pixel")
    right.set_ylabel("|gradient|, of its maximum")
    right.legend(frameon=False, fontsize=9)
    right.set_title(f"effective size: {field_size(effective):.0f} pixels", fontsize=9)
    figure.suptitle(shown(title), fontsize=11)
    return figure
