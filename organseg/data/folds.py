"""Which patient is in which fold, and who validates (METHOD.md 4 and 7).

Folds depend on the sorted patient names and `fold_seed` alone, so that every method and every seed of a comparison is
tested on the same patients. The validation share is drawn from the training patients. Where whole data sets are tested
(METHOD.md 1.7), there are no folds.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from organseg.errors import UsageError


@dataclass(frozen=True)
class Split:
    """Case keys of one fold; no patient is in two of them."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def split(
    patients: Mapping[str, str],
    *,
    fold: int,
    folds: int = 5,
    fold_seed: int = 0,
    val_share: float = 0.15,
    seed: int = 0,
) -> Split:
    """Divide cases by patient.

    Args:
        patients: Case key -> patient.
        fold: The fold that is tested, 0..folds - 1.
        folds: Number of folds.
        fold_seed: Draws the folds.
        val_share: Share of the training patients that validate, at least one where it is above 0.
        seed: Draws the validation patients.

    Returns:
        The split, keys sorted.

    Raises:
        UsageError: If there are fewer patients than folds, or nobody is left to train on.
    """
    names = sorted(set(patients.values()))
    if folds < 2:
        raise UsageError(f"folds: found {folds}, expected at least 2: nobody would be left to train on")
    if not 0 <= fold < folds:
        raise UsageError(f"fold {fold} does not exist: with folds={folds} it is 0..{folds - 1}")
    if len(names) < folds:
        raise UsageError(f"{len(names)} patients cannot make {folds} folds; prepare more cases or set fewer folds")
    order = np.random.default_rng([fold_seed, 0]).permutation(len(names))
    return _divide(patients, {names[i] for i in order[fold::folds]}, val_share, seed)


def hold_out(patients: Mapping[str, str], tested: Collection[str], *, val_share: float = 0.15, seed: int = 0) -> Split:
    """Test the given cases; the others train and validate.

    Args:
        patients: Case key -> patient.
        tested: Keys of the test cases.
        val_share: Share of the other patients that validate, at least one where it is above 0.
        seed: Draws the validation patients.

    Returns:
        The split, keys sorted.

    Raises:
        UsageError: If a patient would be tested and trained on, or nobody is left to train on.
    """
    held = {patients[key]: key for key in sorted(tested, reverse=True)}
    for key in sorted(patients):
        if key not in tested and patients[key] in held:
            raise UsageError(
                f"{key} (training) and {held[patients[key]]} (test) are of one patient, {patients[key]!r}: leave one "
                "out, or name the patients apart in their dataset.yaml, and prepare again"
            )
    if len(tested) == len(patients):
        raise UsageError("every case is a test case, nobody is left to train on; add a data set to `datasets`")
    return _divide(patients, set(held), val_share, seed)


def _divide(patients: Mapping[str, str], tested: Collection[str], val_share: float, seed: int) -> Split:
    """The split with these patients tested, and validation patients drawn from the others."""
    if not 0 <= val_share < 1:
        raise UsageError(f"val_share: found {val_share}, expected 0 or more, and below 1")
    others = [name for name in sorted(set(patients.values())) if name not in tested]
    count = max(1, round(val_share * len(others))) if val_share > 0 else 0
    if count >= len(others):
        remedy = "set it lower" if count else "leave patients to train on"
        raise UsageError(f"val_share {val_share} leaves no patient of {len(others)} to train on; {remedy}")
    chosen = np.random.default_rng([seed, 1]).permutation(len(others))[:count]
    validating = {others[i] for i in chosen}

    def keys(members: Collection[str]) -> tuple[str, ...]:
        return tuple(sorted(key for key, patient in patients.items() if patient in members))

    return Split(keys(set(others) - validating), keys(validating), keys(tested))
