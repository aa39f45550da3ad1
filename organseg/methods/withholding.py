"""Positions that a training withholds, so that a network also learns what to say where an organ was not found (ours).

With a prior in each training view, the network learns logits that are right once the prior's log odds are added: away
from the organ it leaves the No to them. A test case in which the coarse model finds no organ has the plain activation
(METHOD.md 2.3), and there the same logits make an organ up.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def withheld(share: float, step: int, cases: Sequence[str], index_to_mm: Tensor, organs: int) -> Tensor:
    """[B, K] bool: the same for a view in the same step, wherever and whenever it is asked for.

    Args:
        share: Of all pairs of view and organ.
        step: Of the optimiser.
        cases: [B] keys.
        index_to_mm: [B, 4, 4]: which view of the case it is.
        organs: K.
    """
    rows = []
    for case, view in zip(cases, index_to_mm.float().cpu().numpy(), strict=True):
        seed = [step, zlib.crc32(case.encode()), zlib.crc32(view.tobytes())]
        rows.append(np.random.default_rng(seed).random(organs) < share)
    return torch.from_numpy(np.stack(rows))
