"""What can go wrong, as types: each error is one line for the user and carries the exit code of the command.

Nothing here knows the other rooms. The codes: 2 usage or config, 3 some inputs refused, 4 integrity (cache, checkpoint,
run folder), 5 disk or permission, 6 a worker or rank failed, 7 numerics, 75 interrupted with a resumable checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class OrgansegError(Exception):
    """Base of all errors that a user can act on; `exit_code` is the command's."""

    exit_code = 1


class UsageError(OrgansegError):
    """A wrong option, config or manifest."""

    exit_code = 2


class IntegrityError(OrgansegError):
    """A cache file, checkpoint or run folder is damaged, or belongs to something else."""

    exit_code = 4


class StorageError(OrgansegError):
    """The disk is full, or a place cannot be written."""

    exit_code = 5


class WorkerError(OrgansegError):
    """A rank failed, or the ranks do not agree."""

    exit_code = 6


class NumericsError(OrgansegError):
    """Training diverged: no finite loss any more."""

    exit_code = 7


class Interrupted(OrgansegError):  # noqa: N818 - it is asked for, not an error
    """A signal asked to stop; a resumable checkpoint was written."""

    exit_code = 75


@dataclass(frozen=True)
class Fault:
    """One fault of one input: what is wrong, where, and what to do.

    Attributes:
        case: Case id, or the file's name where there is no case.
        path: The file, relative to the input's root where there is one.
        field: The part of the file that is wrong (`affine`, `label values`, ...).
        found: What was found.
        expected: What was expected.
        remedy: What the user can do.
        refused: False for a warning: the input is used all the same.
    """

    case: str
    path: str
    field: str
    found: str
    expected: str
    remedy: str
    refused: bool = True

    def __str__(self) -> str:
        """One line: severity, case, path, field, found, expected, remedy."""
        kind = "refused" if self.refused else "warning"
        what = f"{self.field}: found {self.found}, expected {self.expected}; {self.remedy}"
        return f"{kind}: {self.case}: {self.path}: {what}"


class InputError(OrgansegError):
    """One or more inputs were refused; `faults` lists every fault found."""

    exit_code = 3

    def __init__(self, faults: Sequence[Fault]) -> None:
        """Keep the faults and show them one a line."""
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)

    def __reduce__(self) -> tuple[type["InputError"], tuple[tuple[Fault, ...]]]:
        """Pickle by the faults: the message is made of them."""
        return type(self), (self.faults,)
