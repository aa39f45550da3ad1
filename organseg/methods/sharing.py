"""Work before a training's first step, divided among ranks, that a signal may stop."""

from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
import torch

from organseg.errors import Interrupted
from organseg.processes import STOP

Result = TypeVar("Result")


def shared(trainer: L.Trainer, count: int, work: Callable[[int], Result], doing: str) -> list[Result]:
    """`work` of 0 to `count` - 1, each on one rank; all ranks get all results.

    Args:
        trainer: Of all ranks.
        count: How much there is to do.
        work: What it is; its results can be pickled.
        doing: In words, for who is told that it was stopped.

    Raises:
        Interrupted: If a rank was asked to stop; it is heeded after each turn.
    """
    rank, ranks = trainer.global_rank, trainer.world_size
    mine: dict[int, Result] = {}
    for turn in range(0, count, ranks):
        if turn + rank < count:
            mine[turn + rank] = work(turn + rank)
        if trainer.strategy.reduce_boolean_decision(STOP.asked, all=False):
            raise Interrupted(f"stopped by a signal while {doing}; the same command begins with that again")
    if ranks > 1:
        everyone: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(everyone, mine)
        mine = {number: result for part in everyone for number, result in part.items()}
    return [mine[number] for number in range(count)]
