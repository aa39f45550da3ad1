"""What a user can act on behind the errors of the parser, of Lightning, of torch and of loader workers."""

import re

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from organseg.errors import OrgansegError, UsageError, WorkerError
from organseg.runtime.ddp import lost_rank

_IN_WORKER = "Caught "
_OF_OPTIMIZER = re.compile(r"Invalid (learning rate|weight_decay|beta|epsilon|momentum)")


def known_cause(error: BaseException | None) -> OrgansegError | None:
    """The error of ours behind another one, or what another's means to the user; None for a bug."""
    return _own(error) or _translated(error) or lost_rank(error)


def _own(error: BaseException | None) -> OrgansegError | None:
    """Of ours, as the parser and Lightning wrap it, or as torch brings it from a loader worker."""
    for cause in _chain(error):
        if isinstance(cause, OrgansegError):
            if not str(cause).startswith(_IN_WORKER):
                return cause
            kind = type(cause)  # torch made the traceback its message, at whose end it is said what happened
            return kind(str(cause).rpartition(f"{kind.__module__}.{kind.__name__}: ")[2].strip())
    return None


def _translated(error: BaseException | None) -> OrgansegError | None:
    """What torch or Lightning say of an option that is wrong here, or of too little memory."""
    for cause in _chain(error):
        said = " ".join(str(cause).split())
        if isinstance(cause, MisconfigurationException):
            return UsageError(f"{said[:400]} (see `organseg doctor` for what this machine has)")
        if isinstance(cause, torch.OutOfMemoryError):
            return WorkerError(
                f"the accelerator's memory is full ({said[:120]}): train with a lower data.init_args.batch_size, width "
                "or patch_size; predict with --accelerator cpu"
            )
        if isinstance(cause, ValueError) and _OF_OPTIMIZER.match(said):
            return UsageError(f"model.init_args.optimizer: {said}")
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found
