"""The Dice score as a torchmetrics metric: a shell around `overlap.py` that lets ranks validate different cases."""

import torch
from torch import Tensor
from torchmetrics import Metric

from organseg.metrics.overlap import OverlapCounts


class CaseDice(Metric):
    """Mean Dice score over the cases that annotate each organ, whichever rank saw them.

    The states are one row of counts a case, summed over ranks, so that the result does not depend on how cases were
    dealt out. A case seen twice (a sampler that fills up the last batch) would weigh double: `compute` refuses it.
    """

    intersection: Tensor
    preds: Tensor
    label: Tensor
    evaluated: Tensor

    def __init__(self, cases: int, organs: int) -> None:
        """Make room for `cases` cases and K = `organs` organs."""
        super().__init__()
        for name in ("intersection", "preds", "label", "evaluated"):
            self.add_state(name, torch.zeros(cases, organs, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, index: int, counts: OverlapCounts, annotated: Tensor) -> None:
        """Add case number `index`: its counts [K] and bool [K], False where the organ's truth is unknown."""
        for name in ("intersection", "preds", "label"):
            getattr(self, name)[index] += torch.from_numpy(getattr(counts, name)).to(self.device)
        self.evaluated[index] += annotated.to(self.device, torch.int64)

    def compute(self) -> Tensor:
        """Mean DSC float64 [K] (both empty: 1; one empty: 0), NaN where no case annotates the organ."""
        if (self.evaluated > 1).any():
            twice = (self.evaluated > 1).any(1).nonzero().flatten().tolist()
            raise RuntimeError(f"cases {twice} were counted more than once; use a sampler that repeats no case")
        # On the CPU: not every device knows float64.
        intersection, total, evaluated = self.intersection.cpu(), (self.preds + self.label).cpu(), self.evaluated.cpu()
        score = torch.where(total > 0, 2 * intersection.double() / total, 1.0)
        return (score * evaluated).sum(0) / evaluated.sum(0)
