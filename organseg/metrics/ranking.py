"""How well a score ranks candidates (METHOD.md 1.6; thesis, Tables 3.7 and 3.10)."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_auroc, binary_average_precision


@dataclass(frozen=True)
class Ranking:
    """Of correct against wrong candidates; NaN where all are correct, all are wrong, or there is none.

    Attributes:
        auc: Area under the ROC curve, correct ones positive.
        ap_success: Average precision of the correct ones, by the score.
        ap_error: Average precision of the wrong ones, by the negated score.
    """

    auc: float
    ap_success: float
    ap_error: float


def ranking(score: NDArray[np.float32], correct: NDArray[np.bool_]) -> Ranking:
    """Ranking metrics of candidates.

    Args:
        score: [n] in 0..1, high where the network is sure.
        correct: [n].
    """
    if correct.all() or not correct.any():
        return Ranking(np.nan, np.nan, np.nan)
    preds = torch.from_numpy(score.astype(np.float64))  # 1 - score is exact, so that ties stay what they are
    target = torch.from_numpy(correct.astype(np.int64))
    return Ranking(
        float(binary_auroc(preds, target)),
        float(binary_average_precision(preds, target)),
        float(binary_average_precision(1 - preds, 1 - target)),
    )
