"""Validation cases for a tracker, when asked: each case's DSC as a table, and pictures of a few cases."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from organseg.anatomy import colour_of
from organseg.batch import WholeCase
from organseg.runtime.tracker import WandbTracker

_PICTURES = 3
_FILL = 0.45


class ValidationCases(Callback):
    """Gives a tracker the cases of each validation.

    Args:
        tracker: Where they go.
        offset: Of the training's first step on the run's axis.
    """

    def __init__(self, tracker: WandbTracker, offset: int) -> None:
        self.tracker = tracker
        self.offset = offset
        self.pictures: dict[str, NDArray[np.uint8]] = {}

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Segment a case once more for its picture; rank 0 draws of its own cases."""
        if trainer.is_global_zero and isinstance(batch, WholeCase) and len(self.pictures) < _PICTURES:
            method: Any = pl_module
            self.pictures[batch.key] = draw(batch, method.segment(batch), method.organs)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Send the table of all ranks' cases, and the pictures."""
        method: Any = pl_module
        score, gather = method.val_dice, trainer.strategy.reduce
        counts = (score.intersection, score.preds, score.label, score.evaluated)
        inside, preds, label, known = (gather(count.clone(), reduce_op="sum").cpu().double() for count in counts)
        dsc = torch.where(preds + label > 0, 2 * inside / (preds + label), 1.0)
        dsc = torch.where(known > 0, dsc, torch.nan)
        keys = method.source.case_keys("validate")
        rows = [[key, *row.tolist()] for key, row in zip(keys, dsc, strict=True)]
        if trainer.state.fn == "fit":
            step = trainer.fit_loop.epoch_loop._batches_that_stepped + self.offset  # as Lightning's own of val/dsc
            self.tracker.log_cases(["case", *method.organs], rows, self.pictures, step)
        self.pictures = {}


def draw(case: WholeCase, preds: NDArray[np.uint8], organs: tuple[str, ...]) -> NDArray[np.uint8]:
    """[H, 3 W, 3]: image, label and prediction of the slice in which most is labelled."""
    assert case.truth is not None
    label = np.where(case.truth <= len(organs), case.truth, 0)  # without what is to be ignored
    z = int((label > 0).sum(axis=(1, 2)).argmax())
    grey = case.normalise(case.image[z])
    grey = (grey - grey.min()) / max(float(np.ptp(grey)), 1e-6)
    base = np.repeat(255 * grey[..., None], 3, axis=-1)
    colours = np.array([(0, 0, 0), *map(colour_of, organs)], dtype=np.float32)
    panels = [base]
    for labels in (label[z], preds[z]):
        panels.append(np.where((labels > 0)[..., None], (1 - _FILL) * base + _FILL * colours[labels], base))
    return np.concatenate(panels, axis=1).astype(np.uint8)
