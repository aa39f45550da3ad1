"""Runs that stand beside each other in a table differ in what is compared, and in nothing else."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from organseg.cli.tested import is_tested
from organseg.cli.training import OrgansegCLI, run_lightning
from organseg.errors import IntegrityError
from organseg.runtime.run_folder import RunFolder

COARSE = "model.init_args.coarse"
"""The run whose weights a method goes on from."""

_OF_A_METHOD = (
    "model.class_path",
    *(
        f"model.init_args.{option}"
        for option in (
            "naive", "coarse", "coarse_network", "start", "use", "prior", "bins", "smooth_mm", "floor",
            "working_spacing", "centring", "position", "references", "max_shift_mm", "cross_fitted", "placed_by_others",
            "optimizer.init_args.lr",  # half of it where a training goes on from trained weights
        )
    ),
)  # fmt: skip
"""In which methods may differ; the network, the optimiser and the loss are the same for all."""


def is_finished(run: Path) -> bool:
    """Whether a run has ended, and its test is of its end: a test by hand, half-way, is no result."""
    record = RunFolder(run).record() if (run / "run.json").exists() else None
    return bool(record and record["finished"]) and is_tested(run / "checkpoints" / "last.ckpt", run / "test")


def refuse_another_setup(fit: Sequence[str]) -> None:
    """Refuse a finished run that is asked for with other options now, as this `fit` would, but before data are read.

    Args:
        fit: The words of the command.

    Raises:
        IntegrityError: With every difference.
    """
    with contextlib.suppress(_Equal):
        run_lightning(fit, _Comparison)


class _Equal(Exception):  # noqa: N818 - not an error
    pass


class _Comparison(OrgansegCLI):
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        raise _Equal


def refuse_unequal(runs: Sequence[Path], but: Sequence[str]) -> None:
    """Refuse runs that differ in more than what is compared.

    Args:
        runs: Their folders; those in which nothing was begun are left out.
        but: The keys in which they may differ, with all that belongs to them.

    Raises:
        IntegrityError: With every difference between the first run and another.
    """
    first, *others = _begun(runs) or [(Path(), {})]
    for run, found in others:
        differences = [
            f"{key}: {first[1].get(key, 'nothing')} there, {found.get(key, 'nothing')} here"
            for key in sorted({*first[1], *found})
            if first[1].get(key) != found.get(key) and not _is_of(key, but)  # absent is None: other versions
        ]
        if differences:
            raise IntegrityError(
                f"{run}: cannot be compared with {first[0]}: not the same setup; train them with the same options "
                "(--trainer.precision too, which is the machine's choice where it is not said) into another --out\n  "
                + "\n  ".join(differences)
            )


def _is_of(key: str, parts: Sequence[str]) -> bool:
    """Whether a key is one of these, or an option of one."""
    return any(key == part or key.startswith(f"{part.removesuffix('.')}.") for part in parts)


def refuse_unequal_methods(runs: Sequence[Path], round0: Path) -> None:
    """Refuse methods on the same labels that differ in more than the method, or in the sum of optimiser steps.

    Args:
        runs: Their folders, of one label share and seed.
        round0: The run that methods with rounds begin with; its own steps are not compared.

    Raises:
        IntegrityError: With every difference between the first run and another.
    """
    refuse_unequal(runs, (*_OF_A_METHOD, "curriculum.", "trainer.max_steps", "data.draw_annotated_only"))
    steps = {run: _steps(found) for run, found in _begun(runs) if run != round0}
    steps = {run: count for run, count in steps.items() if count}
    if len(set(steps.values())) > 1:
        listed = "\n  ".join(f"{run}: {count}" for run, count in steps.items())
        raise IntegrityError(
            "methods are compared after equally many optimiser steps, all rounds together; set trainer.max_steps, "
            f"curriculum.rounds and curriculum.round_steps so, in another --out. Found\n  {listed}"
        )


def _steps(identity: Mapping[str, Any]) -> int | None:
    """Of all rounds and of what a run goes on from; None where that is gone."""
    own: int = identity["trainer.max_steps"]
    own += identity.get("curriculum.rounds", 0) * identity.get("curriculum.round_steps", 0)
    coarse = identity.get(COARSE)
    if not coarse or identity.get("model.init_args.start", "coarse") == "scratch":
        return own
    before = _begun([Path(coarse).parents[1]])
    return own + before[0][1]["trainer.max_steps"] if before else None


def _begun(runs: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The runs that are there, and the identity of each."""
    records = ((run, RunFolder(run).record()) for run in runs if (run / "run.json").exists())
    return [(run, record["identity"]) for run, record in records if record]
