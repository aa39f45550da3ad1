"""STIPPLE: a spatial prior inside the activation (METHOD.md 2; thesis, chapter 4).

Each organ's prior is built of the fold's annotated training cases and lies around the organ's centre. Where nobody
annotated the organ, the centre comes from a coarse model: a finished run without a prior, of the same data, whose
network is kept in this method's checkpoints. Whole cases are therefore segmented in two passes, and an organ that the
first does not find is left to it, or placed by the others.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from organseg.batch import Batch, Segmenter, View, WholeCase
from organseg.errors import UsageError
from organseg.files import publish_text
from organseg.losses import Balance
from organseg.methods.base import NetworkFactory, adam, build_network
from organseg.methods.built_priors import built_priors, tell
from organseg.methods.coarse import coarse_weights
from organseg.methods.cross_fitted_priors import Halves
from organseg.methods.given_priors import given_priors, refuse_others
from organseg.methods.organ_positions import Centring, Position, Positioning, PriorGrid
from organseg.methods.partial_label import PartialLabelModule
from organseg.methods.prior_options import refuse_impossible, refuse_unlike
from organseg.methods.sharing import shared
from organseg.networks import UNet
from organseg.networks.guided import MapsAtBottleneck, go_on_from
from organseg.priors import OrganPriors, Prior, completed, place, positions, prior_logits, relations
from organseg.priors.activation import EPS

Use = Literal["activation", "input", "bottleneck", "coordinates"]

SHOWN = {"activation", "input", "bottleneck"}
"""Where a prior can enter."""

DM = 100.0
"""mm: coordinates that a network sees are of the order of 1."""


class PriorModule(PartialLabelModule):
    """One sigmoid an organ, shifted by the log odds of the organ's prior at the voxel's place in the case.

    Args:
        organs: Canonical names in channel order; set by the data.
        coarse: Checkpoint of a run of PartialLabelModule on the same data, fold and seed.
        network: Makes the network from (in_channels, out_channels).
        coarse_network: Makes the coarse model's network, where it is another one.
        start: Weights that training starts from: those of the `coarse` model, or from `scratch`; a later round's follow
            `curriculum.start`.
        use: Where the prior enters: in the `activation` (the thesis); as log odds in further `input` channels or at the
            `bottleneck`; or the voxel's `coordinates` from the middle of all found organs, in decimetres, as input
            channels without a prior (CoordConv; Liu et al., 2018). Several can be combined; with none of them this is
            the `coarse` model, trained on: what the prior is to be compared with.
        prior: Checkpoint of another run of PriorModule whose priors are used as they are, whatever its data; it must be
            of the same `working_spacing`.
        cross_fitted: In training, a case that an organ's prior is built of sees one of other patients alone; see
            `cross_fitted_priors.py`. Not with `prior`.
        bins: Of a prior along z; `all` gives each slice its own. Not of `prior`.
        smooth_mm: Standard deviation of a blur of the priors: few cases do not show all that is possible. Not of
            `prior`.
        floor: Least prior, and 1 - `floor` the greatest, so that no place is impossible and none is certain.
        working_spacing: mm (z, y, x) of the grid that priors are built and organs are found on.
        centring: Of annotated organs, and so of what the prior is built of: the middle of their bounding `boxes`
            (thesis), or where the prior of all of them fits best (`matched`).
        position: Where unannotated organs are taken to be: where the prior fits the coarse segmentation best
            (`matched`), the coarse bounding box's middle `aligned` with references (thesis) or not (`naive`); or the
            `true` centre of a test case, to see what positions cost.
        references: Annotated cases that vote on each position that is `aligned`.
        max_shift_mm: Largest correction along each axis.
        placed_by_others: An unannotated organ that the coarse model does not find is taken to be where the other organs
            say, as organs lie to each other in most training cases (ours); without it, or where no organ is found, the
            organ is left to the coarse model.
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
        use: Sequence[Use] = ("activation",),
        prior: Path | None = None,
        cross_fitted: bool = False,
        bins: int | Literal["all"] = 5,
        smooth_mm: float = 8.0,
        floor: float = 1e-3,
        working_spacing: tuple[float, float, float] = (3.0, 2.0, 2.0),
        centring: Centring = "matched",
        position: Position = "matched",
        references: int = 3,
        max_shift_mm: float = 30.0,
        placed_by_others: bool = False,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = adam,
        lr_decay: float = 0.1,
        balance: Balance = "organ",
        dice: float = 1.0,
        channels_last: bool = True,
    ) -> None:
        uses = set(use)
        if len(uses & {"input", "bottleneck"}) > 1 or uses >= {"coordinates", "bottleneck"}:
            raise UsageError(
                f"model.init_args.use: {list(use)}: what a network sees enters in one place, as channels or below"
            )
        maps = len(organs) * bool(uses & {"input", "bottleneck"}) + 3 * ("coordinates" in uses)

        def seeing(in_channels: int, out_channels: int) -> nn.Module:
            if "bottleneck" in uses:
                return MapsAtBottleneck(network, maps, out_channels)
            return network(in_channels + maps, out_channels)

        super().__init__(organs, seeing, optimizer, lr_decay, False, balance, dice, channels_last)
        refuse_impossible(bins, floor, working_spacing, references, smooth_mm, max_shift_mm)
        refuse_unlike(position, centring)
        if cross_fitted and prior is not None:
            raise UsageError("model.init_args.cross_fitted: the priors are another run's (`prior`); leave out one")
        if start == "coarse" and coarse_network is not None:
            raise UsageError("model.init_args: `start: coarse` needs the coarse model's network; set `start: scratch`")
        given = build_network(coarse_network or network, 1, len(organs))
        self.coarse = given.to(memory_format=self.memory_format).requires_grad_(False).eval()  # type: ignore[call-overload]
        self.coarse_checkpoint = coarse
        self.prior_checkpoint = prior
        self.use = uses
        self.start = start
        self.bins = bins
        self.floor = floor
        self.position: Position = position
        self.positioning = Positioning(PriorGrid(working_spacing), centring, references, max_shift_mm, smooth_mm)
        self.cross_fitted = cross_fitted
        self.placed_by_others = placed_by_others
        self.known: OrganPriors | None = None
        self.halves: Halves | None = None
        self.centres: dict[str, NDArray[np.float32]] = {}
        """Of the training cases: key -> [K, 3] mm, NaN where the organ has none."""
        self.between: NDArray[np.float32] | None = None
        """How organs lie to each other there, [K, K, 3] mm."""
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
        halves = {"halves": self.halves.to_state()} if self.halves else {}
        between = {} if self.between is None else {"between": torch.from_numpy(self.between)}
        return {**self.known.to_state(), **halves, "centres": centres, **between}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them from a checkpoint."""
        if state:
            self.known = OrganPriors.from_state(state)
            self.halves = Halves.from_state(state["halves"]) if "halves" in state else None
            self.centres = {key: centre.cpu().numpy() for key, centre in state["centres"].items()}
            self.between = state["between"].cpu().numpy() if "between" in state else None
            if self.between is None and self.centres:  # of a version that did not keep it
                self.between = relations(self.centres.values())

    # Training.

    def begin(self, afresh: bool = False) -> None:
        """Build the priors and find all organs, unless a checkpoint brought them."""
        if self.known is None:
            if self.position == "true":
                raise UsageError("model.init_args.position: `true` is for a test alone; train with another")
            taken = {"coarse": self.coarse_checkpoint, "prior": self.prior_checkpoint}
            made_of = refuse_others(self._folder / "made_of.json", taken)
            self._load_coarse(self.start == "coarse" and not afresh)
            self._set_priors()
            found = self._training_centres() if self.use else {}
            self.between = relations(found.values()) if found else None
            self.centres = {key: self._completed(one, self.source.unknown_organs(key)) for key, one in found.items()}
            if self.trainer.is_global_zero and self.use:
                assert self.known is not None
                path = self._folder / "centres.csv"
                tell(path, self.source, self.organs, self.known, self.halves, self.centres, found)
            if self.trainer.is_global_zero:
                self._folder.mkdir(parents=True, exist_ok=True)
                publish_text(self._folder / "made_of.json", json.dumps(made_of, indent=1))

    @property
    def _folder(self) -> Path:
        """In the run folder, whatever the phase of a curriculum."""
        return Path(self.trainer.default_root_dir) / "prior"

    def take_over(self, other: Segmenter) -> None:
        """The priors, the centres and the coarse model of another one, of the same run."""
        if isinstance(other, PriorModule):
            self.known, self.halves = other.known, other.halves
            self.centres, self.between = other.centres, other.between
            self.coarse.load_state_dict(other.coarse.state_dict())

    def _set_priors(self) -> None:
        """Of the training cases, or of another run."""
        organs, positioning = self.organs, self.positioning
        if not self.use:
            self.known = OrganPriors((None,) * len(organs), ((),) * len(organs), positioning.centring)
        elif self.prior_checkpoint is not None:
            self.known = given_priors(Path(self.prior_checkpoint), organs, positioning, self.source)
        else:
            if self.trainer.is_global_zero:
                cases = len(self.source.training_cases())
                print(f"builds priors of {len(organs)} organs, and finds them in {cases} cases", flush=True)
            self.known, self.halves = built_priors(
                self.source, organs, positioning, self.bins, self.cross_fitted, partial(shared, self.trainer)
            )

    def _load_coarse(self, go_on: bool) -> None:
        """Take the coarse model's weights, also to go on from.

        Raises:
            UsageError: If there is none, or it is not of this run's kind.
        """
        weights = coarse_weights(
            self.coarse_checkpoint, self.organs, self.source.preprocessing, self.source.content_hash
        )
        try:
            self.coarse.load_state_dict(weights)
            if go_on:
                go_on_from(self.network, weights)
        except RuntimeError as error:
            raise UsageError(
                f"{self.coarse_checkpoint}: another network ({' '.join(str(error).split())[:120]}); describe it in "
                "model.init_args.coarse_network, with `start: scratch`"
            ) from error

    def _training_centres(self) -> dict[str, NDArray[np.float32]]:
        """Annotated organs where their annotations say, others where the coarse model finds them; ranks share."""
        cases = self.source.training_cases()

        def of(number: int) -> tuple[str, NDArray[np.float32]]:
            case = cases[number]
            assert self.known is not None
            centre = self.positioning.annotated(case, self.known)
            if self.halves:
                self.halves.centre(centre, case, self.positioning)
            if not case.annotated.all():
                centre[~case.annotated] = self._located(case, ~case.annotated)[~case.annotated]
            return case.key, centre

        return dict(shared(self.trainer, len(cases), of, "finding organs"))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """METHOD.md 1.2 at the biased logits, normalised over all ranks."""
        return super().loss(self._biased(logits, batch), batch)

    # The prior of a view.

    def activate(self, logits: Tensor, view: View) -> Tensor:
        """Sigmoid of the biased logits."""
        return torch.sigmoid(self._biased(logits, view))

    def probabilities(self, view: View) -> Tensor:
        """Those of the network; of an organ with a prior that was not found, those of the coarse model.

        The network's logits are right once the log odds of the prior are added: away from the organ they leave it to
        those to say No, and with a neutral prior would make the organ up.
        """
        probs = super().probabilities(view)
        if not self.use & SHOWN:
            return probs
        assert self.known is not None
        has_prior = torch.tensor([prior is not None for prior in self.known.priors], device=probs.device)
        lost = self._centres(view).isnan().any(dim=-1) & has_prior
        if not lost.any():
            return probs
        return torch.where(lost.view(*lost.shape, *(1,) * self.dims), self._coarse_probabilities(view), probs)

    def _biased(self, logits: Tensor, view: View) -> Tensor:
        if "activation" not in self.use:
            return logits
        return prior_logits(logits, self.prior_of(view, logits.shape[2:]))

    def inputs(self, view: View) -> Tensor:
        """The image, and what else the network sees."""
        seen = [view["image"]]
        size = view["image"].shape[2:]
        if self.use & {"input", "bottleneck"}:
            seen.append(torch.logit(self.prior_of(view, size), EPS))
        if "coordinates" in self.use:
            seen.append(self._coordinates(view, size))
        return torch.cat(seen, dim=1).contiguous(memory_format=self.memory_format)

    def _coordinates(self, view: View, size: Sequence[int]) -> Tensor:
        """[B, 3, *S]: decimetres (z, y, x) from the mean of all centres that were found, 0 without one."""
        middle = self._centres(view).nanmean(dim=1).view(-1, 1, 1, 1, 3)
        away = ((positions(view["index_to_mm"], size) - middle) / DM).nan_to_num().movedim(-1, 1)
        return away if len(size) == 3 else away.squeeze(2)

    def prior_of(self, view: View, size: Sequence[int]) -> Tensor:
        """[B, K, *S]: each voxel's prior; neutral where nobody knows where the organ is."""
        assert self.known is not None
        where = (view["index_to_mm"], self._centres(view), size, self.floor)
        found = place(self.known.priors, *where)
        if self.halves is None or not any(case in self.halves.seen for case in view["case"]):
            return found
        of_all = np.zeros(len(self.organs), dtype=np.int64)
        seen = np.stack([self.halves.seen.get(case, of_all) for case in view["case"]])
        for number, half in self.halves.both:
            theirs = seen == number
            if theirs.any():
                priors = [prior if wanted else None for prior, wanted in zip(half.priors, theirs.any(0), strict=True)]
                mask = torch.from_numpy(theirs).to(found.device).view(*theirs.shape, *(1,) * len(size))
                found = torch.where(mask, place(priors, *where), found)
        return found

    def seen_by(self, case: str) -> list[Prior | None]:
        """Of each organ, the prior that a case of this key sees."""
        assert self.known is not None
        return self.halves.of(case, self.known.priors) if self.halves else list(self.known.priors)

    def _centres(self, view: View) -> Tensor:
        """[B, K, 3] mm: of training cases what was found before training, of others the view's own."""
        centre = view["centre"]
        unknown = np.full((len(self.organs), 3), np.nan, dtype=np.float32)
        found = np.stack([self.centres.get(case, unknown) for case in view["case"]])
        ours = torch.from_numpy(found).to(centre)
        return torch.where(ours.isnan(), centre, ours)

    # Whole cases.

    def sweep(
        self,
        case: WholeCase,
        outputs: Callable[[View], Tensor],
        decide: Callable[[Tensor], Tensor],
        keep: Callable[[int, Tensor], None] | None = None,
    ) -> NDArray[np.uint8]:
        """As always, once the organs' positions are known."""
        return super().sweep(replace(case, centre=self.centres_of(case)), outputs, decide, keep)

    def centres_of(self, case: WholeCase) -> NDArray[np.float32]:
        """[K, 3] mm: of a training case as it was trained with, of another one as the coarse model finds it."""
        if not self.use:
            return np.full((len(self.organs), 3), np.nan, dtype=np.float32)
        if case.key in self.centres:
            return self.centres[case.key]
        if self.position == "true":
            if case.truth is None:
                raise UsageError("model.init_args.position: `true` needs a truth, which scans to predict have not")
            assert self.known is not None
            return self.positioning.annotated(case, self.known)
        every = np.ones(len(self.organs), dtype=bool)
        if case.key not in self._found:
            self._found[case.key] = self._located(case, every)
        return self._completed(self._found[case.key], every)

    def _completed(self, centres: NDArray[np.float32], wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Wanted organs that have a prior and no centre placed by the others, if that is asked for."""
        if not (self.placed_by_others and self.use & SHOWN):
            return centres
        assert self.known is not None and self.between is not None
        return completed(centres, self.between, wanted & [prior is not None for prior in self.known.priors])

    def forget_positions(self) -> None:
        """Find all organs anew: `position` was changed."""
        self._found.clear()

    def _located(self, case: WholeCase, wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """[K, 3] mm: where the coarse model finds the wanted organs; NaN for the others, and where it finds nothing."""
        assert self.known is not None
        on_grid = self.positioning.grid.of(case)
        return self.positioning.found(on_grid, self.segment_coarsely(on_grid), wanted, self.known, self.position)

    def segment_coarsely(self, case: WholeCase) -> NDArray[np.float16]:
        """[K, Z, Y, X] of the coarse model on the case's wanted grid: probabilities."""
        probs = np.empty((len(self.organs), *case.shape), dtype=np.float16)

        def keep(start: int, slab: Tensor) -> None:
            probs[:, start : start + len(slab)] = slab.half().cpu().numpy().swapaxes(0, 1)

        super().sweep(case, self._coarse_probabilities, self.decide, keep)
        return probs

    def _coarse_probabilities(self, view: View) -> Tensor:
        """Of the coarse model, with the plain activation."""
        with self.trainer.precision_plugin.forward_context():
            logits: Tensor = self.coarse(view["image"].contiguous(memory_format=self.memory_format))
        return torch.sigmoid(logits.float())
