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
    mm = positions(index_to_mm, size)
    found = [
        _of_organ(prior, mm, centre[:, k], floor)
        if prior is not None
        else torch.full(mm.shape[:-1], NEUTRAL, device=mm.device)
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


def _of_organ(prior: Prior, mm: Tensor, centre: Tensor, floor: float) -> Tensor:
    """Prior [B, D, H, W] of one organ: the bin's value along z, linear in the plane."""
    known = ~centre.isnan().any(dim=1)
    depth, height, width = prior.size
    bins = len(prior.probs)
    spacing = torch.tensor(prior.spacing, device=mm.device)
    # Voxels of the box, counted from its first.
    middle = (torch.tensor(prior.size, device=mm.device) - 1) / 2
    z, y, x = ((mm - centre.nan_to_num()[:, None, None, None]) / spacing + middle).unbind(-1)
    of_slice = torch.floor(z + 0.5 + _ROUNDING)
    bin_index = torch.floor(of_slice * bins / depth)
    # grid_sample counts from border to border, -1 to 1; a bin's own number makes "linear along z" that bin alone.
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1, (2 * bin_index + 1) / bins - 1], dim=-1)
    table = torch.from_numpy(prior.probs).to(mm.device).expand(len(mm), 1, -1, -1, -1)
    probs = F.grid_sample(table, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
    beyond = (of_slice < 0) | (of_slice >= depth)
    probs = probs.masked_fill(beyond, 0.0).clamp(min=floor)
    return torch.where(known.view(-1, 1, 1, 1), probs, NEUTRAL)
