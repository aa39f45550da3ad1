"""Priors of another run, as they are: of the same grid and centring, and of nothing that is held out here."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from organseg.batch import CaseSource
from organseg.checkpoints import load_checkpoint, verify_checkpoint
from organseg.errors import IntegrityError, UsageError
from organseg.methods.organ_positions import Positioning
from organseg.priors import OrganPriors


def given_priors(path: Path, organs: Sequence[str], positioning: Positioning, source: CaseSource) -> OrganPriors:
    """The priors of a checkpoint of PriorModule.

    Raises:
        UsageError: If there is none, or it has no priors, or they are of other organs, another grid or centring, or of
            annotations that are held out here.
    """
    if not path.exists():
        raise UsageError(f"model.init_args.prior: {path}: no such checkpoint; give one of a run of PriorModule")
    state = load_checkpoint(path).get("state_dict", {}).get("_extra_state")
    if not isinstance(state, dict) or not {"priors", "references"} <= state.keys():
        raise UsageError(f"model.init_args.prior: {path}: holds no priors; train PriorModule")
    theirs = OrganPriors.from_state(state)
    found = theirs.of(organs)
    if not any(found.priors):
        has = ", ".join(prior.organ for prior in theirs.priors if prior) or "no organ"
        raise UsageError(
            f"model.init_args.prior: {path}: has priors of {has}, this run's organs are {', '.join(organs)}; give one "
            "that has some of them"
        )
    _refuse_what_is_held_out(path, found, organs, source)
    if found.centring != positioning.centring:
        raise UsageError(
            f"model.init_args.prior: {path}: its centring is {found.centring}, this run's is {positioning.centring}"
        )
    spacings = {prior.spacing for prior in found.priors if prior is not None}
    if spacings != {positioning.grid.spacing}:
        raise UsageError(
            f"model.init_args.prior: {path}: its working_spacing is "
            f"{', '.join(map(str, spacings))}, this run's is {positioning.grid.spacing}"
        )
    return found


def _refuse_what_is_held_out(path: Path, found: OrganPriors, organs: Sequence[str], source: CaseSource) -> None:
    """By key, patient and image: the same scan may lie in another data set under another name."""
    held: dict[str, set[int]] = {}  # who -> channels that are held out or hidden here
    for stage in ("validate", "test", "fit"):
        for key in source.case_keys(stage):
            hidden = source.unknown_organs(key) if stage == "fit" else np.ones(len(organs), dtype=bool)
            for who in (key, *source.identity_of(key)):
                held.setdefault(who, set()).update(map(int, np.flatnonzero(hidden)))
    wrong = sorted(
        f"{case} ({organ})"
        for k, organ in enumerate(organs)
        for case in found.cases_of(k)
        if any(k in held.get(who, ()) for who in (case, *found.identities.get(case, ())))
    )
    if wrong:
        raise UsageError(
            f"model.init_args.prior: {path}: built of annotations that are held out or hidden here: "
            f"{', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}; give a run of the same fold and label share, "
            "or of other patients"
        )


def refuse_others(path: Path, checkpoints: Mapping[str, Path | None]) -> dict[str, str]:
    """sha256 of the checkpoints that a run takes from others, the same for all of its phases.

    Args:
        path: Where an earlier phase wrote that down, or nothing yet.
        checkpoints: Name -> file, if any; those that are not there are left out.

    Raises:
        IntegrityError: If an earlier phase found others there.
    """
    there = {name: Path(file) for name, file in checkpoints.items() if file}
    found = {name: verify_checkpoint(file) for name, file in there.items() if file.exists()}
    if path.exists() and path.read_text() != json.dumps(found, indent=1):
        raise IntegrityError(
            f"{path}: this run was begun with another {' or '.join(map(str, there.values()))}: put that back, or start "
            "anew with --overwrite"
        )
    return found
