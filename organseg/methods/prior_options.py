"""Options of STIPPLE that make no sense, or none together."""

import math
from typing import Literal

from organseg.errors import UsageError
from organseg.methods.organ_positions import Centring, Position


def refuse_impossible(
    bins: int | Literal["all"],
    floor: float,
    working_spacing: tuple[float, float, float],
    references: int,
    smooth_mm: float,
    max_shift_mm: float,
) -> None:
    """Refuse numbers that `PriorModule` cannot compute with.

    Raises:
        UsageError: With all of them.
    """
    if (
        (bins != "all" and bins < 1)
        or not 0 < floor < 0.5
        or not all(0 < mm < math.inf for mm in working_spacing)
        or references < 1
        or min(smooth_mm, max_shift_mm) < 0
    ):
        raise UsageError(
            f"model.init_args: bins {bins} and references {references} must be at least 1, floor {floor} between "
            f"0 and 0.5, working_spacing {working_spacing} positive, smooth_mm {smooth_mm} and max_shift_mm "
            f"{max_shift_mm} not negative"
        )


def refuse_unlike(position: Position, centring: Centring) -> None:
    """Refuse to centre a test's organs otherwise than those of training.

    Raises:
        UsageError: If they are.
    """
    if position != "true" and (position == "matched") != (centring == "matched"):
        raise UsageError(
            f"model.init_args: position {position} with centring {centring}: a test's organs would be centred "
            "otherwise than those of training; matched goes with matched, aligned and naive with boxes"
        )
