"""The prior of every voxel of a batch, from where the voxel and the organ are in the case (METHOD.md 2.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from organseg.priors.build import Prior

NEUTRAL = 0.5
"""The plain activation: where nobody knows where the organ is."""
_ROUNDING = 1e-3
"""Of a slice: positions in mm are fp32."""


def place(
    priors: Sequence[Prior | None], index_to_mm: Tensor, centre: Tensor, size: Sequence[int], floor: float
) -> Tensor:
    """Priors of K organs for slices or patches.

    Args:
        priors: Of each organ; None where there is none.
        index_to_mm: [B, 4, 4], index (z, y, x, 1) -> mm (z, y, x, 1) in the case.
        centre: [B, K, 3] mm (z, y, x) of each organ's centre there; NaN where unknown.
        size: [*S], H, W or D, H, W.
        floor: Least prior where the organ's position is known.

    Returns:
        fp32 [B, K, *S]; `NEUTRAL` for organs without a prior or a position.
    """
    whole = (1,) * (3 - len(size)) + tuple(size)
    found = [
        torch.full((len(centre), *whole), NEUTRAL, device=centre.device)
        if prior is None
        else _of_organ(prior, index_to_mm.float(), centre[:, k], whole, floor)
        for k, prior in enumerate(priors)
    ]
    result = torch.stack(found, dim=1)
    return result if len(size) == 3 else result.squeeze(2)


def positions(index_to_mm: Tensor, size: Sequence[int]) -> Tensor:
    """Mm (z, y, x) of each voxel, [B, D, H, W, 3]; slices have D = 1."""
    whole = (1,) * (3 - len(size)) + tuple(size)
    axes = [torch.arange(n, device=index_to_mm.device, dtype=torch.float32) for n in whole]
    index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    turn, shift = index_to_mm[:, None, None, :3, :3].float(), index_to_mm[:, None, None, None, :3, 3].float()
    return index.expand(len(index_to_mm), *index.shape) @ turn.mT + shift


def _of_organ(prior: Prior, index_to_mm: Tensor, centre: Tensor, size: Sequence[int], floor: float) -> Tensor:
    """Prior [B, D, H, W] of one organ: the bin's value along z, linear in the plane."""
    device = index_to_mm.device
    known = ~centre.isnan().any(dim=1)
    depth, height, width = prior.size
    # Index -> voxel of the box, counted from its first: one affine map, as cheap as its three axes one by one.
    spacing, middle = torch.tensor(prior.spacing, device=device), (torch.tensor(prior.size, device=device) - 1) / 2
    turn = index_to_mm[:, :3, :3] / spacing[:, None]
    shift = (index_to_mm[:, :3, 3] - centre.nan_to_num()) / spacing + middle

    def coordinate(axis: int, scale: float, offset: float) -> Tensor:
        """[B, D, H, W], or with 1 where it does not change: scale * voxel + offset along an axis of the box."""
        total = (scale * shift[:, axis] + offset).view(-1, 1, 1, 1)
        for along, n in enumerate(size):
            slope = scale * turn[:, axis, along]
            if n > 1 and slope.any():
                shape = [-1 if place == along else 1 for place in range(3)]
                steps = torch.arange(n, device=device, dtype=torch.float32).view(1, *shape)
                total = total + slope.view(-1, 1, 1, 1) * steps
        return total

    of_slice = torch.floor(coordinate(0, 1.0, 0.5 + _ROUNDING))
    bin_index = torch.floor(of_slice * len(prior.probs) / depth)
    beyond = (of_slice < 0) | (of_slice >= depth)
    table = torch.from_numpy(prior.probs).to(device)
    # grid_sample counts from border to border, -1 to 1.
    across, down = (coordinate(axis, 2 / n, 1 / n - 1).expand(-1, *size) for axis, n in ((2, width), (1, height)))
    if bin_index[0].numel() == 1:  # slices: one bin each
        flat = torch.stack([across, down], dim=-1).flatten(1, 2)
        planes = table[bin_index.flatten().long().clamp(0, len(table) - 1)].unsqueeze(1)
        probs = F.grid_sample(planes, flat, align_corners=False).view(len(flat), *size)
    else:
        # A bin's own number makes "linear along z" that bin alone.
        upward = ((2 * bin_index + 1) / len(table) - 1).expand(-1, *size)
        grid = torch.stack([across, down, upward], dim=-1)
        probs = F.grid_sample(table.expand(len(grid), 1, -1, -1, -1), grid, align_corners=False)[:, 0]
    probs = probs.masked_fill(beyond, 0.0).clamp(min=floor)
    return torch.where(known.view(-1, 1, 1, 1), probs, NEUTRAL)
