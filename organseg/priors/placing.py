"""The prior of every voxel of a batch, from where the voxel and the organ are in the case (METHOD.md 2.1)."""

import functools
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
        floor: Least prior where the organ's position is known, and 1 - `floor` the greatest.

    Returns:
        fp32 [B, K, *S]; `NEUTRAL` for organs without a prior or a position.
    """
    whole = (1,) * (3 - len(size)) + tuple(size)
    moves = (index_to_mm[:, :3, :3] != 0).any(dim=0).tolist()  # one wait for the device, not one an organ and axis
    found = [
        torch.full((len(centre), *whole), NEUTRAL, device=centre.device)
        if prior is None
        else _of_organ(prior, index_to_mm.float(), moves, centre[:, k], whole, floor)
        for k, prior in enumerate(priors)
    ]
    result = torch.stack(found, dim=1)
    return result if len(size) == 3 else result.squeeze(2)


def positions(index_to_mm: Tensor, size: Sequence[int]) -> Tensor:
    """Mm (z, y, x) of each voxel, [B, D, H, W, 3]; slices have D = 1."""
    whole = (1,) * (3 - len(size)) + tuple(size)
    # Sums and no matrix product: under autocast that would round positions to millimetres.
    mm = index_to_mm[:, None, None, None, :3, 3].float()
    for axis, n in enumerate(whole):
        shape = [-1 if place == axis else 1 for place in range(3)]
        steps = torch.arange(n, device=index_to_mm.device, dtype=torch.float32).view(1, *shape, 1)
        mm = mm + steps * index_to_mm[:, None, None, None, :3, axis].float()
    return mm.expand(-1, *whole, 3)


@functools.lru_cache(maxsize=128)
def _table(prior: Prior, device: torch.device) -> Tensor:
    """A prior's values where they are needed, copied once."""
    return torch.from_numpy(prior.probs).to(device)


@functools.lru_cache(maxsize=128)
def _box(prior: Prior, device: torch.device) -> tuple[Tensor, Tensor]:
    """Its spacing and the index of its middle, [3] each, copied once: a device would be waited for at each copy."""
    return torch.tensor(prior.spacing).to(device), ((torch.tensor(prior.size) - 1) / 2).to(device)


def _of_organ(
    prior: Prior,
    index_to_mm: Tensor,
    moves: Sequence[Sequence[bool]],
    centre: Tensor,
    size: Sequence[int],
    floor: float,
) -> Tensor:
    """Prior [B, D, H, W] of one organ: the bin's value along z, linear in the plane.

    `moves` says for each mm axis and index axis whether one depends on the other in any image.
    """
    device = index_to_mm.device
    known = ~centre.isnan().any(dim=1)
    depth, height, width = prior.size
    # Index -> voxel of the box, counted from its first: one affine map, as cheap as its three axes one by one.
    spacing, middle = _box(prior, device)
    turn = index_to_mm[:, :3, :3] / spacing[:, None]
    shift = (index_to_mm[:, :3, 3] - centre.nan_to_num()) / spacing + middle

    def coordinate(axis: int, scale: float, offset: float) -> Tensor:
        """[B, D, H, W], or with 1 where it does not change: scale * voxel + offset along an axis of the box."""
        total = (scale * shift[:, axis] + offset).view(-1, 1, 1, 1)
        for along, n in enumerate(size):
            if n > 1 and moves[axis][along]:
                slope = scale * turn[:, axis, along]
                shape = [-1 if place == along else 1 for place in range(3)]
                steps = torch.arange(n, device=device, dtype=torch.float32).view(1, *shape)
                total = total + slope.view(-1, 1, 1, 1) * steps
        return total

    of_slice = torch.floor(coordinate(0, 1.0, 0.5 + _ROUNDING))
    bin_index = torch.floor(of_slice * len(prior.probs) / depth)
    beyond = (of_slice < 0) | (of_slice >= depth)
    table = _table(prior, device)
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
    probs = probs.masked_fill(beyond, 0.0).clamp(floor, 1 - floor)
    return torch.where(known.view(-1, 1, 1, 1), probs, NEUTRAL)
