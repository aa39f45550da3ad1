"""What a run knows of where its organs are, as a checkpoint carries it: tensors and plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from organseg.priors.build import Prior
from organseg.priors.position import Reference


@dataclass(frozen=True, eq=False)
class OrganPriors:
    """Of all organs, in channel order.

    Attributes:
        priors: None where no case shows the organ.
        references: What coarse segmentations of the organ are moved onto.
        centring: What the priors lie around: the middle of `boxes`, or where they fit best (`matched`).
        identities: Case key -> patient and sha256 of the image, of all that this is built of.
    """

    priors: tuple[Prior | None, ...]
    references: tuple[tuple[Reference, ...], ...]
    centring: str
    identities: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def cases_of(self, channel: int) -> set[str]:
        """Whose annotations of an organ went into its prior or its references."""
        prior = self.priors[channel]
        return {reference.case for reference in self.references[channel]} | set(prior.cases if prior else ())

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "priors": [None if prior is None else _prior_state(prior) for prior in self.priors],
            "references": [[_reference_state(reference) for reference in pool] for pool in self.references],
            "centring": self.centring,
            "identities": {case: list(identity) for case, identity in self.identities.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "OrganPriors":
        """Of a checkpoint."""
        return cls(
            tuple(None if prior is None else _prior(prior) for prior in state["priors"]),
            tuple(tuple(_reference(reference) for reference in pool) for pool in state["references"]),
            state.get("centring", "matched"),  # not in checkpoints of earlier versions; nor are identities
            {case: (patient, image) for case, (patient, image) in state.get("identities", {}).items()},
        )

    def of(self, organs: Sequence[str]) -> "OrganPriors":
        """Those of other organs, in their order; none where this knows nothing of one."""
        place = {prior.organ: n for n, prior in enumerate(self.priors) if prior is not None}
        found = [place.get(organ) for organ in organs]
        return OrganPriors(
            tuple(None if n is None else self.priors[n] for n in found),
            tuple(() if n is None else self.references[n] for n in found),
            self.centring,
            self.identities,
        )


def _prior_state(prior: Prior) -> dict[str, Any]:
    return {
        "organ": prior.organ,
        "probs": torch.from_numpy(prior.probs),
        "box_mm": list(prior.box_mm),
        "spacing": list(prior.spacing),
        "bins": prior.bins,
        "cases": list(prior.cases),
    }


def _prior(state: Mapping[str, Any]) -> Prior:
    box_mm, spacing = tuple(state["box_mm"]), tuple(state["spacing"])
    return Prior(state["organ"], state["probs"].cpu().numpy(), box_mm, spacing, state["bins"], tuple(state["cases"]))


def _reference_state(reference: Reference) -> dict[str, Any]:
    packed = torch.from_numpy(np.packbits(reference.mask))
    return {"case": reference.case, "shape": list(reference.mask.shape), "mask": packed}


def _reference(state: Mapping[str, Any]) -> Reference:
    shape = tuple(state["shape"])
    flat = np.unpackbits(state["mask"].cpu().numpy(), count=int(np.prod(shape)))
    return Reference(state["case"], flat.reshape(shape).astype(bool))
