"""Ranks that train one network hold the same one, bit by bit (FAULTS.md 6).

DDP averages gradients, so all ranks take the same step from the same weights; a rank that does not (broken memory, a
library of another version, a parameter that DDP does not know) would spoil the result without a word. Running
statistics are another matter: each rank counts its own share, and rank 0's are saved; DDP gives them to the others
before each forward pass, Lightning before a validation.
"""

import hashlib
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from organseg.errors import WorkerError


class SameWeights(Callback):
    """Lets no checkpoint be written of which the ranks hold different weights."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare digests; every rank is here, and all of them raise.

        Raises:
            WorkerError: If the ranks do not agree.
        """
        if trainer.world_size == 1:
            return
        mine = torch.tensor(list(weights_digest(pl_module)), dtype=torch.uint8, device=trainer.strategy.root_device)
        gathered = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(gathered, mine)
        groups: defaultdict[bytes, list[str]] = defaultdict(list)
        for rank, digest in enumerate(gathered):
            groups[bytes(digest.tolist())].append(str(rank))
        if len(groups) > 1:
            parted = " and ".join(f"{', '.join(ranks)} ({digest.hex()[:8]})" for digest, ranks in groups.items())
            raise WorkerError(
                f"the ranks hold different weights after step {trainer.global_step}: {parted}; nothing was saved since "
                "they last agreed: run the same command again, and if this comes back, check the machines' memory and "
                "that all have the same versions"
            )


def weights_digest(module: nn.Module) -> bytes:
    """SHA-256 of all parameters, trained or frozen, in their order."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
