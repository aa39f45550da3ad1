"""STIPPLE: a spatial prior inside the activation (METHOD.md 2; thesis, chapter 4).

Each organ's prior is built of the fold's annotated training cases and lies around the organ's centre. Where nobody
annotated the organ, the centre comes from a coarse model: a finished run without a prior, of the same data, whose
network is kept in this method's checkpoints. Whole cases are therefore segmented in two passes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from organseg.batch import Batch, View, WholeCase
from organseg.checkpoints import load_checkpoint
from organseg.errors import UsageError
from organseg.losses import Balance, partial_label_loss
from organseg.methods.base import NetworkFactory, adam
from organseg.methods.organ_positions import Positioning, PriorGrid, learned_priors, true_centres, write_centres
from organseg.methods.partial_label import PartialLabelModule
from organseg.networks import UNet
from organseg.priors import OrganPriors, place, prior_logits
from organseg.volumes import Preprocessing

Position = Literal["aligned", "naive", "true"]


class PriorModule(PartialLabelModule):
    """One sigmoid an organ, shifted by the log odds of the organ's prior at the voxel's place in the case.

    Args:
        organs: Canonical names in channel order; set by the data.
        coarse: Checkpoint of a finished run of PartialLabelModule on the same data, fold and seed.
        network: Makes the network from (in_channels, out_channels).
        coarse_network: Makes the coarse model's network, where it is another one.
        start: Weights that training starts from: those of the `coarse` model, or from `scratch`.
        bins: Of a prior along z; `all` gives each slice its own.
        floor: Least prior, so that no place is impossible.
        working_spacing: mm (z, y, x) of the grid that priors are built and organs are found on.
        position: Where unannotated organs are taken to be: the coarse model's centre, `aligned` with references or not
            (`naive`); or at the `true` centre of a test case, to see what positions cost.
        references: Annotated cases that vote on each alignment.
        max_shift_mm: Largest correction along each axis.
        optimizer: Makes the optimiser from the parameters.
        lr_decay: Learning rate at the last step as a share of the first.
        balance: See `partial_label_loss`.
        dice: See `partial_label_loss`.
        channels_last: Memory format of the network.
    """

    def __init__(
        self,
        organs: Sequence[str],
        coarse: Path | None = None,
        network: NetworkFactory = UNet,
        coarse_network: NetworkFactory | None = None,
        start: Literal["coarse", "scratch"] = "coarse",
        bins: int | Literal["all"] = 5,
        floor: float = 1e-3,
        working_spacing: tuple[float, float, float] = (3.0, 2.0, 2.0),
        position: Position = "aligned",
        references: int = 3,
        max_shift_mm: float = 30.0,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = adam,
        lr_decay: float = 0.1,
        balance: Balance = "organ",
        dice: float = 1.0,
        channels_last: bool = True,
    ) -> None:
        super().__init__(organs, network, optimizer, lr_decay, False, balance, dice, channels_last)
        if (bins != "all" and bins < 1) or not 0 < floor < 1 or min(working_spacing) <= 0 or references < 1:
            raise UsageError(
                f"model.init_args: bins {bins} and references {references} must be at least 1, floor {floor} between "
                f"0 and 1, working_spacing {working_spacing} positive"
            )
        if start == "coarse" and coarse_network is not None:
            raise UsageError("model.init_args: `start: coarse` needs the coarse model's network; set `start: scratch`")
        given = (coarse_network or network)(1, len(organs))
        self.coarse = given.to(memory_format=self.memory_format).requires_grad_(False).eval()  # type: ignore[call-overload]
        self.coarse_checkpoint = coarse
        self.start = start
        self.bins = bins
        self.floor = floor
        self.position: Position = position
        self.positioning = Positioning(PriorGrid(working_spacing), references, max_shift_mm)
        self.known: OrganPriors | None = None
        self.centres: dict[str, NDArray[np.float32]] = {}
        """Of the training cases: key -> [K, 3] mm, NaN where the organ has none."""
        self._found: dict[str, NDArray[np.float32]] = {}

    def train(self, mode: bool = True) -> "PriorModule":
        """The coarse model stays as it is."""
        super().train(mode)
        self.coarse.eval()
        return self

    # What checkpoints carry beside the weights.

    def get_extra_state(self) -> dict[str, Any]:
        """Priors, references and the training cases' centres."""
        if self.known is None:
            return {}
        centres = {key: torch.from_numpy(centre) for key, centre in self.centres.items()}
        return {**self.known.to_state(), "centres": centres}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them from a checkpoint."""
        if state:
            self.known = OrganPriors.from_state(state)
            self.centres = {key: centre.cpu().numpy() for key, centre in state["centres"].items()}

    # Training.

    def on_fit_start(self) -> None:
        """Build the priors and find all organs, unless a checkpoint brought them."""
        if self.known is None:
            self._load_coarse()
            self.known = learned_priors(self.source.training_cases(), self.organs, self.positioning.grid, self.bins)
            self.centres = self._training_centres()
            if self.trainer.is_global_zero:
                folder = Path(self.trainer.default_root_dir) / "prior"
                write_centres(folder / "centres.csv", self.source.training_cases(), self.organs, self.centres)

    def _load_coarse(self) -> None:
        """Take the coarse model's weights.

        Raises:
            UsageError: If there is none, or it is of other organs, data, folds, hidden labels or preprocessing.
        """
        path = self.coarse_checkpoint
        if path is None or not Path(path).exists():
            raise UsageError(
                f"model.init_args.coarse: {path or 'nothing'}: no such checkpoint; STIPPLE finds organs by a coarse "
                "model: train one first, for example by the experiment of the same name that ends in `_inerrant0`"
            )
        checkpoint = load_checkpoint(Path(path))
        record = checkpoint.get("organseg")
        if not isinstance(record, dict):
            raise UsageError(f"{path}: not a checkpoint of organseg; train one with `organseg fit`")
        same = {
            "organs": record["organs"] == list(self.organs),
            "preprocessing": Preprocessing.from_json(record["preprocessing"]) == self.preprocessing,
            "data": record["identity"].get("data content") == self.source.content_hash,
        }
        differing = [name for name, equal in same.items() if not equal]
        if differing:
            raise UsageError(
                f"{path}: trained with other {' and '.join(differing)}: it may have seen patients or labels that are "
                "hidden from this run; give a run of the same data, fold, label share and seed"
            )
        weights = {
            name.removeprefix("network."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("network.")
        }
        try:
            self.coarse.load_state_dict(weights)
            if self.start == "coarse":
                self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise UsageError(
                f"{path}: another network ({' '.join(str(error).split())[:120]}); describe it in "
                "model.init_args.coarse_network, with `start: scratch`"
            ) from error

    def _training_centres(self) -> dict[str, NDArray[np.float32]]:
        """Annotated organs at their annotations' centres, others where the coarse model finds them; ranks share."""
        cases = self.source.training_cases()
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        mine: dict[str, NDArray[np.float32]] = {}
        for number in range(rank, len(cases), ranks):
            case = cases[number]
            mine[case.key] = true_centres(case, len(self.organs))
            if not case.annotated.all():
                mine[case.key][~case.annotated] = self._located(case, ~case.annotated)[~case.annotated]
        if ranks == 1:
            return mine
        everyone: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(everyone, mine)
        return {key: centre for part in everyone for key, centre in sorted(part.items())}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """METHOD.md 1.2 at the biased logits, normalised over all ranks."""
        biased = prior_logits(logits, self.prior_of(batch, logits.shape[2:]))
        return partial_label_loss(
            biased, batch["label"], batch["annotated"], balance=self.balance, dice=self.dice, all_sum=self.all_sum
        )

    # The prior of a view.

    def activate(self, logits: Tensor, view: View) -> Tensor:
        """Sigmoid of the biased logits."""
        return torch.sigmoid(prior_logits(logits, self.prior_of(view, logits.shape[2:])))

    def prior_of(self, view: View, size: Sequence[int]) -> Tensor:
        """[B, K, *S]: each voxel's prior; neutral where nobody knows where the organ is."""
        assert self.known is not None
        centre = view["centre"]
        unknown = np.full((len(self.organs), 3), np.nan, dtype=np.float32)
        found = np.stack([self.centres.get(case, unknown) for case in view["case"]])
        centre = torch.where(centre.isnan(), torch.from_numpy(found).to(centre), centre)
        return place(self.known.priors, view["index_to_mm"], centre, size, self.floor)

    # Whole cases.

    def sweep(
        self,
        case: WholeCase,
        outputs: Callable[[View], Tensor],
        decide: Callable[[Tensor], Tensor],
        keep: Callable[[int, Tensor], None] | None = None,
    ) -> NDArray[np.uint8]:
        """As always, once the organs' positions are known."""
        return super().sweep(replace(case, centre=self._centres_of(case)), outputs, decide, keep)

    def _centres_of(self, case: WholeCase) -> NDArray[np.float32]:
        """[K, 3] mm: of a training case as it was trained with, of another one as the coarse model finds it."""
        if case.key in self.centres:
            return self.centres[case.key]
        if self.position == "true":
            if case.truth is None:
                raise UsageError("model.init_args.position: `true` needs a truth, which scans to predict have not")
            return true_centres(case, len(self.organs))
        if case.key not in self._found:
            self._found[case.key] = self._located(case, np.ones(len(self.organs), dtype=bool))
        return self._found[case.key]

    def _located(self, case: WholeCase, wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """[K, 3] mm: where the coarse model finds the wanted organs; NaN for the others, and where it finds nothing."""
        assert self.known is not None
        on_grid = self.positioning.grid.of(case)
        probs = np.empty((len(self.organs), *on_grid.shape), dtype=np.float16)

        def keep(start: int, slab: Tensor) -> None:
            probs[:, start : start + len(slab)] = slab.half().cpu().numpy().swapaxes(0, 1)

        super().sweep(on_grid, self._coarse_probabilities, self.decide, keep)
        references = self.known.references if self.position == "aligned" else ((),) * len(self.organs)
        return self.positioning.centres(on_grid, probs, wanted, references)

    def _coarse_probabilities(self, view: View) -> Tensor:
        """Of the coarse model, with the plain activation."""
        with self.trainer.precision_plugin.forward_context():
            logits: Tensor = self.coarse(view["image"].contiguous(memory_format=self.memory_format))
        return torch.sigmoid(logits.float())
