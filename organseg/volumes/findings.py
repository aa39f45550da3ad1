"""The faults of one file while it is read: collected, so that a refusal names all that could be found at once."""

from pathlib import Path

from organseg.errors import Fault, InputError


class Findings:
    """Collects refusals and warnings about one file.

    Attributes:
        faults: What was found, in the order found.
    """

    def __init__(self, case: str, path: Path, root: Path | None) -> None:
        self.faults: list[Fault] = []
        self._case = case
        # Below the root only: what lies above it may name a patient (FAULTS.md section 9).
        self._path = str(path.relative_to(root)) if root is not None and path.is_relative_to(root) else str(path)

    def refuse(self, field: str, found: str, expected: str, remedy: str) -> None:
        """Note a fault for which the file cannot be used."""
        self.faults.append(Fault(self._case, self._path, field, found, expected, remedy))

    def warn(self, field: str, found: str, expected: str, remedy: str) -> None:
        """Note a fault that was corrected or does no harm."""
        self.faults.append(Fault(self._case, self._path, field, found, expected, remedy, refused=False))

    @property
    def refused(self) -> bool:
        """True once anything was refused."""
        return any(fault.refused for fault in self.faults)

    def error(self) -> InputError:
        """The error to raise, with warnings too: they may explain the refusal."""
        return InputError(self.faults)

    def settle(self) -> list[Fault]:
        """The warnings.

        Raises:
            InputError: Something was refused.
        """
        if self.refused:
            raise self.error()
        return self.faults
