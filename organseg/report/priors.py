"""What a run knows of where its organs are (thesis, Figures 4.1, 4.2 and 4.5)."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from organseg.priors import Prior, place
from organseg.report.figures import colour_of, new_figure, organ_title, shown
from organseg.report.overlays import paint
from organseg.report.views import Slice

_PANEL = 1.9


def draw_priors(priors: Sequence[Prior], most: int = 8) -> Figure:
    """Each organ's bins from the lowest to the highest, all in one scale of mm; of more than `most` an even choice."""
    columns = min(most, max(len(prior.probs) for prior in priors))
    figure = new_figure(_PANEL * columns + 1.5, _PANEL * len(priors) + 0.6)
    grid = figure.subplots(len(priors), columns, squeeze=False)
    reach = max(max(prior.box_mm[1:]) for prior in priors) / 2
    for line, prior in zip(grid, priors, strict=True):
        bins = len(prior.probs)
        chosen = np.unique(np.linspace(0, bins - 1, columns).round().astype(int))
        height, width = prior.box_mm[1] / 2, prior.box_mm[2] / 2
        for axes in line:
            axes.set_axis_off()
        for axes, index in zip(line, chosen, strict=False):
            axes.set_axis_on()
            axes.set_facecolor("black")
            axes.imshow(prior.probs[index], cmap="inferno", vmin=0, vmax=1, extent=(-width, width, height, -height))
            axes.set_xlim(-reach, reach)
            axes.set_ylim(reach, -reach)
            axes.set_xticks([])
            axes.set_yticks([])
            low, high = (prior.box_mm[0] * (edge / bins - 0.5) for edge in (index, index + 1))
            axes.set_title(f"bin {index}: {low:+.0f} to {high:+.0f} mm", fontsize=8)
        line[0].set_ylabel(
            f"{shown(organ_title(prior.organ))}\n{len(prior.cases)} case{'s' * (len(prior.cases) != 1)}", fontsize=9
        )
    figure.suptitle(
        f"Share of the cases that have the organ at each place around its centre; panels are {2 * reach:.0f} mm wide, "
        "seen from the feet",
        fontsize=10,
    )
    return figure


def draw_placed(
    priors: Sequence[Prior],
    floor: float,
    centres: NDArray[np.float32],
    image: NDArray[np.generic],
    spacing: tuple[float, float, float],
    window: tuple[float, float],
    truth: NDArray[np.uint8],
    title: str,
) -> Figure:
    """Each organ's prior where it was placed in a case, through its centre: axial above, coronal below.

    Args:
        priors: Of the organs.
        floor: See `place`.
        centres: [K, 3] mm (z, y, x); NaN where the organ was not found.
        image: [Z, Y, X].
        spacing: mm (z, y, x).
        window: Intensities to show as black and white.
        truth: [Z, Y, X] labels k + 1 in the order of `priors`, outlined.
        title: Of the figure.
    """
    figure = new_figure(3.0 * len(priors), 6.6)
    grid = figure.subplots(2, len(priors), squeeze=False)
    depth, height, width = image.shape
    for k, prior in enumerate(priors):
        name = shown(organ_title(prior.organ))
        if np.isnan(centres[k]).any():
            for axes in grid[:, k]:
                axes.set_axis_off()
            grid[0, k].set_title(f"{name}\nnot found: no prior", fontsize=9)
            continue
        z, y, _ = (
            int(np.clip(round(float(mm) / step), 0, n - 1))
            for mm, step, n in zip(centres[k], spacing, image.shape, strict=True)
        )

        def plane(start: tuple[int, int, int], size: tuple[int, int, int], k: int = k) -> NDArray[np.float32]:
            """The prior of one plane alone: that of a whole scan can be large."""
            to_mm = torch.diag(torch.tensor([*spacing, 1.0]))
            to_mm[:3, 3] = torch.tensor(start) * torch.tensor(spacing)
            placed = place([priors[k]], to_mm[None], torch.from_numpy(centres[k])[None, None], size, floor)
            return placed.squeeze().numpy()

        axial = Slice(name, "A", image[z], (spacing[1], spacing[2]))
        coronal = Slice(name, "H", image[::-1, y], (spacing[0], spacing[2]))
        mask = truth == k + 1
        _draw(grid[0, k], axial, window, plane((z, 0, 0), (1, height, width)), mask[z], prior.organ)
        upright = plane((0, y, 0), (depth, 1, width))[::-1]
        _draw(grid[1, k], coronal, window, upright, mask[::-1, y], prior.organ)
        grid[0, k].set_title(f"{name}\ncentre z {centres[k][0]:.0f}, y {centres[k][1]:.0f}, x {centres[k][2]:.0f} mm",
                             fontsize=9)  # fmt: skip
    figure.suptitle(shown(title), fontsize=10)
    return figure


def _draw(
    axes: Axes,
    view: Slice,
    window: tuple[float, float],
    prior: NDArray[np.float32],
    truth: NDArray[np.bool_],
    organ: str,
) -> None:
    """The slice, the prior's levels over it, and the truth's outline."""
    paint(axes, view, window, None)
    (down, across), (height, width) = view.pixel_mm, view.image.shape
    x, y = (np.arange(width) + 0.5) * across, (np.arange(height) + 0.5) * down
    axes.contourf(x, y, prior, levels=[0.05, 0.25, 0.5, 0.75, 1.01], cmap="inferno", alpha=0.45)
    if truth.any():
        axes.contour(x, y, truth, levels=[0.5], colors=[colour_of(organ)], linewidths=1.5)
    axes.set_xlim(0, width * across)
    axes.set_ylim(height * down, 0)
