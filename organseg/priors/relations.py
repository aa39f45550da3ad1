"""How organs lie to each other, and where an organ is that was not found (ours; METHOD.md 2.3 has it neutral)."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def relations(centres: Iterable[NDArray[np.floating]]) -> NDArray[np.float32]:
    """[K, K, 3] mm: at [i, j] from organ j to organ i, the median over cases that have both; NaN where no case has.

    Args:
        centres: Of each case, of one at least, [K, 3] mm, NaN where an organ has none.
    """
    of_cases = np.stack(list(centres))
    found = np.full((of_cases.shape[1],) * 2 + (3,), np.nan, dtype=np.float32)
    for j in range(of_cases.shape[1]):
        for i in range(of_cases.shape[1]):
            ways = of_cases[:, i] - of_cases[:, j]
            ways = ways[~np.isnan(ways).any(axis=-1)]
            if len(ways):
                found[i, j] = np.median(ways, axis=0)
    return found


def completed(
    centres: NDArray[np.float32], between: NDArray[np.float32], wanted: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """A case's centres, wanted organs that have none put where those that have one say: the median along each axis.

    NaN stays where no organ has a centre, or none of those ever was in a case together with the organ.

    Args:
        centres: [K, 3] mm, NaN where an organ has none.
        between: What `relations` says.
        wanted: [K].
    """
    result = centres.copy()
    for i in np.flatnonzero(np.isnan(centres).any(axis=-1) & wanted):
        said = centres + between[i]
        said = said[~np.isnan(said).any(axis=-1)]
        result[i] = np.median(said, axis=0) if len(said) else np.nan
    return result
