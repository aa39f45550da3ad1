"""What all methods share: optimiser and decay, whole-case validation, test and prediction.

A method is a network, a loss on a batch, and how probabilities become labels; the rest is here (METHOD.md 4).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from organseg.batch import Batch, CaseSource, Segmenter, View, WholeCase
from organseg.errors import UsageError
from organseg.inference import segment_slices, segment_windows
from organseg.losses import deep_supervision
from organseg.methods.evaluation import CaseEvaluation
from organseg.metrics import CaseDice, overlap_counts
from organseg.volumes import Preprocessing

NetworkFactory = Callable[[int, int], nn.Module]
"""(in_channels, out_channels) -> a network from image to logits, with `features` (image -> [B, C, *S]) and `head`."""


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The thesis's optimiser."""
    return torch.optim.Adam(parameters, lr=1e-4)


def build_network(make: NetworkFactory, in_channels: int, out_channels: int) -> nn.Module:
    """The network of a method.

    Raises:
        UsageError: If there is no network with the options that were given.
    """
    try:
        return make(in_channels, out_channels)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.init_args: {error}") from error


class SegmentationModule(L.LightningModule):
    """Base of the methods.

    Args:
        organs: Canonical names in channel order.
        network: The network, built with the method's number of outputs.
        optimizer: Makes the optimiser from the parameters; its `lr` is where the decay starts.
        lr_decay: Learning rate at the last step as a share of the first; exponential, per step.
        channels_last: Memory format of the network; about twice as fast on CPUs and with mixed precision.
    """

    preprocessing: Preprocessing
    lr_share: float = 1.0
    """Of the optimiser's learning rate: less where a curriculum goes on training from trained weights."""
    afresh: bool = False
    """Whether new weights are kept where the method would begin with others'."""

    keep: Callable[[int, Tensor], None] | None = None
    """Who wants to see the probabilities of a prediction, slab by slab."""

    def __init__(
        self,
        organs: Sequence[str],
        network: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_decay: float,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < lr_decay <= 1:
            raise UsageError(f"lr_decay is {lr_decay}, expected a share above 0 and at most 1")
        self.organs = tuple(organs)
        self.optimizer = optimizer
        self.lr_decay = lr_decay
        head: Any = getattr(network, "head", None)
        if not isinstance(getattr(head, "weight", None), Tensor) or not hasattr(network, "features"):
            raise UsageError(
                f"model.init_args.network: {type(network).__name__} has no `head` (its last layer, a convolution with "
                "bias) or no `features` (image -> what enters the head); see README, networks of your own"
            )
        self.dims: int = head.weight.ndim - 2
        last = torch.channels_last if self.dims == 2 else torch.channels_last_3d
        self.memory_format = last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # missing in stubs

    # What a method says.

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Scalar loss of a batch, over all ranks; see `all_sum`."""
        raise NotImplementedError

    def activate(self, logits: Tensor, view: View) -> Tensor:
        """Logits [B, C, *S] of a view -> probabilities."""
        raise NotImplementedError

    def decide(self, probs: Tensor) -> Tensor:
        """Probabilities [B, C, *S] -> labels [B, *S]."""
        raise NotImplementedError

    def inputs(self, view: View) -> Tensor:
        """What the network sees of a view, [B, C, *S]."""
        return view["image"].contiguous(memory_format=self.memory_format)

    # Training.

    def begin(self, afresh: bool = False) -> None:
        """What a training needs before its first step, unless a checkpoint brought it; `afresh`: keep new weights."""

    def take_over(self, other: Segmenter) -> None:
        """Know what another method of the same run found before its training; nothing, where it finds nothing."""

    def on_fit_start(self) -> None:
        """Begin."""
        self.begin(self.afresh)

    def all_sum(self, sums: Tensor) -> Tensor:
        """Sum over ranks, the other ranks' part detached."""
        if not torch.distributed.is_initialized():
            return sums
        total = sums.detach().clone()
        torch.distributed.all_reduce(total)
        return sums + (total - sums.detach())

    def batch_loss(self, batch: Batch) -> Tensor:
        """Loss of a batch, of all resolutions that the network has logits of."""
        outputs = self.network(self.inputs(batch))
        return deep_supervision(self.loss)(outputs, batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of this rank's share; multiplied by the world size because DDP averages gradients."""
        loss = self.batch_loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["image"]))
        return loss * self.trainer.world_size

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser, with the learning rate decaying exponentially over `trainer.max_steps`."""
        optimizer = self.optimizer(self.network.parameters())
        steps = self.trainer.max_steps
        decay = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.lr_share * self.lr_decay ** (step / steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def describe(self) -> dict[str, Any]:
        """What prediction needs beside the weights, as plain values."""
        return {"organs": list(self.organs), "preprocessing": self.preprocessing.to_json()}

    # Whole cases.

    @property
    def source(self) -> CaseSource:
        """The data module, as far as methods know it."""
        source: CaseSource = self.trainer.datamodule  # type: ignore[attr-defined]  # set by the trainer
        return source

    def setup(self, stage: str) -> None:
        """Take the preprocessing of the training cases, unless a checkpoint brings its own.

        Raises:
            UsageError: If the network is 3D and the data are slices, or the other way round.
        """
        if stage == "predict":
            return
        if stage == "fit":
            self.preprocessing = self.source.preprocessing
        given = 2 if self.source.preprocessing.window is None else 3
        if self.dims != given:
            raise UsageError(
                f"the network has dims {self.dims}, the data module gives {given}D: "
                "SliceDataModule goes with dims 2, PatchDataModule with dims 3"
            )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Whole cases stay where they are: their slabs travel."""
        if isinstance(batch, WholeCase):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def probabilities(self, view: View) -> Tensor:
        """Slices or patches [B, 1, *S] -> probabilities [B, C, *S], fp32."""
        with self.trainer.precision_plugin.forward_context():
            logits = self.network(self.inputs(view))
        return self.activate(logits.float(), view)

    def organ_probabilities(self, view: View) -> Tensor:
        """The same without a background: [B, K, *S]."""
        return self.probabilities(view)[:, -len(self.organs) :]

    def segment(self, case: WholeCase, keep: Callable[[int, Tensor], None] | None = None) -> NDArray[np.uint8]:
        """Labels [Z, Y, X] on the case's wanted grid."""
        return self.sweep(case, self.probabilities, self.decide, keep)

    def centres_of(self, case: WholeCase) -> NDArray[np.floating[Any]] | None:
        """[K, 3] mm (z, y, x): where the method takes the organs of a case to be; None if it does not ask."""
        return case.centre

    def sweep(
        self,
        case: WholeCase,
        outputs: Callable[[View], Tensor],
        decide: Callable[[Tensor], Tensor],
        keep: Callable[[int, Tensor], None] | None = None,
    ) -> NDArray[np.uint8]:
        """A whole case through `outputs` (images -> channels), decided slab by slab; `keep` sees each slab."""
        segment = segment_slices if case.window is None else segment_windows
        return segment(case, outputs, decide, device=self.device, keep=keep)

    def on_validation_epoch_start(self) -> None:
        """Count every validation case once, over all ranks."""
        self.val_dice = CaseDice(len(self.source.case_keys("validate")), len(self.organs)).to(self.device)

    def validation_step(self, case: WholeCase | None, batch_idx: int) -> None:
        """Overlap of one whole case; None is a turn without a case."""
        if case is None:
            return
        assert case.truth is not None
        counts = overlap_counts(self.segment(case), case.truth, len(self.organs))
        self.val_dice.update(case.number, counts, torch.from_numpy(case.annotated))

    def on_validation_epoch_end(self) -> None:
        """Mean DSC per organ over the cases that annotate it, and its mean over organs."""
        scores = self.val_dice.compute()
        known = ~scores.isnan()
        for organ, score in zip(self.organs, scores, strict=True):
            if not score.isnan():
                self.log(f"val/dsc/{organ}", score, rank_zero_only=True)
        if known.any():
            self.log("val/dsc", scores[known].mean(), prog_bar=True, rank_zero_only=True)

    def on_test_epoch_start(self) -> None:
        """One table for all cases."""
        self.evaluation = CaseEvaluation(self.source.case_keys("test"), self.organs, self.trainer)

    def test_step(self, case: WholeCase | None, batch_idx: int) -> None:
        """All metrics of one case on its file's own grid; None is a turn without a case."""
        if case is not None:
            self.evaluation.add(case, self.segment(case))

    def on_test_epoch_end(self) -> None:
        """Write the tables."""
        for name, value in self.evaluation.finish().items():
            self.log(name, value, rank_zero_only=True)

    def predict_step(self, case: WholeCase | None, batch_idx: int) -> NDArray[np.uint8] | None:
        """Labels [Z, Y, X] in the input's own geometry (LPS); None for an input that was refused."""
        return None if case is None else self.segment(case, self.keep)
