"""Spatial priors of organs: where an organ is around its centre, and how that enters an activation (METHOD.md 2)."""

from organseg.priors.activation import prior_logits, prior_sigmoid, prior_softmax, with_background
from organseg.priors.align import align
from organseg.priors.build import Prior, build_prior, cropped, smoothed
from organseg.priors.matching import continued, matched_centre, matched_prior, slices_of
from organseg.priors.placing import place, positions
from organseg.priors.position import Reference, coarse_centre, corrected_centre, drawn
from organseg.priors.record import OrganPriors
from organseg.priors.relations import completed, relations

__all__ = [
    "OrganPriors",
    "Prior",
    "Reference",
    "align",
    "build_prior",
    "coarse_centre",
    "completed",
    "continued",
    "corrected_centre",
    "cropped",
    "drawn",
    "matched_centre",
    "matched_prior",
    "place",
    "positions",
    "prior_logits",
    "prior_sigmoid",
    "prior_softmax",
    "relations",
    "slices_of",
    "smoothed",
    "with_background",
]
