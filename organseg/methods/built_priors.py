"""Priors of a fold's own annotated training cases (METHOD.md 2.1)."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from organseg.batch import CaseSource
from organseg.methods.cross_fitted_priors import Halves, half_pools
from organseg.methods.organ_positions import MOST_REFERENCES, Pools, Positioning, learned_prior, pooled, write_centres
from organseg.priors import OrganPriors, Prior, drawn


class Each(Protocol):
    """`sharing.shared` of a trainer: results of `work` of 0 to `count` - 1, in order."""

    def __call__(self, count: int, work: Callable[[int], Any], doing: str) -> list[Any]:
        """Do it."""


def in_turn(count: int, work: Callable[[int], Any], doing: str) -> list[Any]:
    """Without other ranks."""
    return [work(number) for number in range(count)]


def built_priors(
    source: CaseSource,
    organs: Sequence[str],
    positioning: Positioning,
    bins: int | Literal["all"],
    cross_fitted: bool = False,
    each: Each = in_turn,
) -> tuple[OrganPriors, Halves | None]:
    """Priors and references of all organs, of all annotated training cases; and, `cross_fitted`, of two halves of them.

    Args:
        source: Its training cases, with what they annotate.
        organs: In channel order.
        positioning: Its grid, and how organs are centred.
        bins: Along z.
        cross_fitted: See `cross_fitted_priors.py`.
        each: Divides cases and organs among ranks.
    """
    cases = source.training_cases()
    masks = each(len(cases), lambda n: positioning.grid.masks(cases[n]), "reading annotations")
    pools = pooled(masks, len(organs))
    identities = {ref.case: source.identity_of(ref.case) for pool in pools for ref in pool}

    def learned(pools: Pools, references: Pools) -> OrganPriors:
        def of(k: int) -> Prior | None:
            return learned_prior(organs[k], pools[k], positioning, bins)

        priors = tuple(each(len(organs), of, "building priors"))
        return OrganPriors(priors, references, positioning.centring, identities)

    of_all = learned(pools, tuple(tuple(drawn(pool, "", positioning.seed, MOST_REFERENCES)) for pool in pools))
    if not cross_fitted:
        return of_all, None
    halves = half_pools(pools, {case: patient for case, (patient, _) in identities.items()})
    return of_all, Halves(*(learned(half, ((),) * len(organs)) for half in halves))


def tell(
    path: Path,
    source: CaseSource,
    organs: Sequence[str],
    known: OrganPriors,
    halves: Halves | None,
    centres: Mapping[str, NDArray[np.float32]],
    found: Mapping[str, NDArray[np.float32]],
) -> None:
    """Warn of organs without a prior, or with one patient's; write the table of the training cases' centres.

    Args:
        path: Of the table.
        source: The training cases.
        organs: In channel order.
        known: Their priors.
        halves: Of what is cross-fitted.
        centres: Of each training case, [K, 3] mm.
        found: Those that are not placed by the others.
    """
    without = [organ for organ, prior in zip(organs, known.priors, strict=True) if prior is None]
    if without:
        said = f"no prior of {', '.join(without)}: there is nothing to build it of"
        print(f"organseg: warning: {said}; the activation stays plain", file=sys.stderr)
    alone = halves.undivided(organs, without) if halves else []
    if alone:
        said = f"the prior of {', '.join(alone)} is of one patient, who sees it in training"
        print(f"organseg: warning: {said}", file=sys.stderr)
    annotated = {key: ~source.unknown_organs(key) for key in source.case_keys("fit")}
    write_centres(path, annotated, organs, centres, found, without)
