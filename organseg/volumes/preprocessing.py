"""What happens to a scan between its file and a network: one record, saved in the checkpoint, used by all commands."""

from dataclasses import asdict, dataclass
from typing import Any

from numpy.typing import NDArray

from organseg.volumes.intensity import Normalisation, own_normalisation
from organseg.volumes.working_grid import WorkingGrid


@dataclass(frozen=True)
class Preprocessing:
    """Resampling and normalisation.

    Attributes:
        grid: Where the network sees the scan.
        normalisation: Of CT; None for MR, where each case has its own.
        window: [Z, Y, X] of the patches that the network sees; None where it sees whole slices.
    """

    grid: WorkingGrid
    normalisation: Normalisation | None
    window: tuple[int, int, int] | None = None

    def normalisation_of(self, image: NDArray[Any]) -> Normalisation:
        """The normalisation of a case, given its image on the working grid."""
        return self.normalisation or own_normalisation(image)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocessing":
        """The record that `to_json` wrote."""
        grid, normalisation, window = values["grid"], values["normalisation"], values.get("window")
        spacing = tuple(grid["spacing"]) if grid["spacing"] else None
        return cls(
            WorkingGrid(grid["size"], spacing),
            normalisation
            and Normalisation(tuple(normalisation["window"]), normalisation["mean"], normalisation["std"]),
            window and tuple(window),
        )
