"""Priors of another run, as they are: of the same grid and centring, and of nothing that is held out here."""

from collections.abc import Sequence
from pathlib import Path

from organseg.batch import CaseSource
from organseg.checkpoints import load_checkpoint
from organseg.errors import UsageError
from organseg.methods.organ_positions import Positioning
from organseg.priors import OrganPriors


def given_priors(path: Path, organs: Sequence[str], positioning: Positioning, source: CaseSource) -> OrganPriors:
    """The priors of a checkpoint of PriorModule.

    Raises:
        UsageError: If there is none, or it has no priors, or they are of another grid or centring, or of annotations
            that are held out here.
    """
    if not path.exists():
        raise UsageError(f"model.init_args.prior: {path}: no such checkpoint; give one of a run of PriorModule")
    state = load_checkpoint(path)["state_dict"].get("_extra_state")
    if not state:
        raise UsageError(f"model.init_args.prior: {path}: holds no priors; train PriorModule")
    found = OrganPriors.from_state(state).of(organs)
    _refuse_what_is_held_out(path, found, organs, source)
    if found.centring != positioning.centring:
        raise UsageError(
            f"model.init_args.prior: {path}: its centring is {found.centring}, this run's is {positioning.centring}"
        )
    spacings = {prior.spacing for prior in found.priors if prior is not None}
    if spacings != {positioning.grid.spacing}:
        raise UsageError(
            f"model.init_args.prior: {path}: its working_spacing is "
            f"{', '.join(map(str, spacings)) or 'of none of these organs'}, this run's is {positioning.grid.spacing}"
        )
    return found


def _refuse_what_is_held_out(path: Path, found: OrganPriors, organs: Sequence[str], source: CaseSource) -> None:
    held = {*source.case_keys("validate"), *source.case_keys("test")}
    hidden = {key: source.unknown_organs(key) for key in source.case_keys("fit")}
    wrong = sorted(
        {
            f"{case} ({organ})"
            for k, organ in enumerate(organs)
            for case in found.cases_of(k)
            if case in held or (case in hidden and hidden[case][k])
        }
    )
    if wrong:
        raise UsageError(
            f"model.init_args.prior: {path}: built of annotations that are held out or hidden here: "
            f"{', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}; give a run of the same fold and label share, "
            "or of other data"
        )
