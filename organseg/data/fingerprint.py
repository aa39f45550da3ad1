"""What networks' sizes follow from: shape and spacing of every prepared case (Isensee et al., 2021: the fingerprint).

`prepare` writes `CACHE/<data set>/fingerprint.json`; `organseg plan` reads those of the data sets that train together.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from organseg.data.cache import CachedCase
from organseg.errors import IntegrityError
from organseg.files import publish_text

FILE = "fingerprint.json"


@dataclass(frozen=True)
class Fingerprint:
    """Of some cases on their working grid.

    Attributes:
        shapes: [Z, Y, X] of each case.
        spacings: mm (z, y, x) of each case.
    """

    shapes: tuple[tuple[int, int, int], ...]
    spacings: tuple[tuple[float, float, float], ...]

    @property
    def median_shape(self) -> tuple[int, int, int]:
        """[Z, Y, X], each axis by itself."""
        z, y, x = (round(float(n)) for n in np.median(self.shapes, axis=0))
        return (z, y, x)

    @property
    def median_spacing(self) -> tuple[float, float, float]:
        """Spacing in mm (z, y, x), each axis by itself."""
        z, y, x = (float(mm) for mm in np.median(self.spacings, axis=0))
        return (z, y, x)


def write_fingerprint(folder: Path, cases: Sequence[CachedCase]) -> None:
    """Publish the fingerprint of a prepared data set: medians for people, each case for `read_fingerprint`."""
    if not cases:
        return
    found = Fingerprint(tuple(case.shape for case in cases), tuple(case.header.spacing for case in cases))
    document = {
        "median_shape": found.median_shape,
        "median_spacing_mm": found.median_spacing,
        "cases": {
            case.path.stem: {"shape": shape, "spacing_mm": spacing}
            for case, shape, spacing in zip(cases, found.shapes, found.spacings, strict=True)
        },
    }
    publish_text(folder / FILE, json.dumps(document, indent=1))


def read_fingerprint(folders: Sequence[Path]) -> Fingerprint:
    """The fingerprint of several prepared data sets together.

    Raises:
        IntegrityError: If one is missing or damaged.
    """
    shapes: list[tuple[int, int, int]] = []
    spacings: list[tuple[float, float, float]] = []
    for folder in folders:
        path = folder / FILE
        try:
            for case in json.loads(path.read_text())["cases"].values():
                z, y, x = case["shape"]
                shapes.append((int(z), int(y), int(x)))
                z, y, x = case["spacing_mm"]
                spacings.append((float(z), float(y), float(x)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"{path}: no readable fingerprint ({error!r}); run `organseg prepare` again"
            ) from error
    if not shapes or min(map(min, shapes)) < 1 or not all(0 < mm < math.inf for spacing in spacings for mm in spacing):
        names = ", ".join(str(folder / FILE) for folder in folders)
        raise IntegrityError(f"{names}: no cases, or sizes that none can have; run `organseg prepare` again")
    return Fingerprint(tuple(shapes), tuple(spacings))
