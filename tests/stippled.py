"""STIPPLE at toy size: a coarse model, a method and its trainer, for the tests of the prior in the method."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch

from organseg.batch import View
from organseg.data import SliceDataModule
from organseg.methods import PartialLabelModule, PriorModule
from organseg.networks import UNet
from organseg.runtime.checkpoint_io import save_checkpoint

ORGANS = ("liver", "left_kidney", "right_kidney", "spleen")
GRID = (10.0, 9.0, 8.0)


def small(in_channels: int, out_channels: int) -> UNet:
    return UNet(in_channels, out_channels, width=4, depth=3)


def data_of(cache: Path, **options) -> SliceDataModule:
    given = {"label_share": 0.4, "val_share": 0.0, "batch_size": 4, "workers": 0, "organs": ORGANS}
    return SliceDataModule(cache, **{**given, **options})


def coarse_of(data: SliceDataModule, path: Path, steps: int = 9, **record) -> Path:
    torch.manual_seed(5)
    said = {
        "model": {"class_path": "organseg.methods.PartialLabelModule"},
        "organs": list(data.organs),
        "preprocessing": data.preprocessing.to_json(),
        "identity": {"data content": data.content_hash},
    }
    module = PartialLabelModule(data.organs, small)
    whole = {"state_dict": module.state_dict(), "organseg": {**said, **record}, "global_step": steps, "callbacks": {}}
    save_checkpoint(whole, path)
    return path


def method(coarse: Path | None, organs: Sequence[str] = ORGANS, **options) -> PriorModule:
    torch.manual_seed(0)
    given = {"network": small, "working_spacing": GRID, "references": 2, "centring": "boxes", "position": "aligned",
             "smooth_mm": 0.0}  # fmt: skip
    return PriorModule(organs, coarse, **{**given, **options})


def trainer(folder: Path, steps: int = 2) -> L.Trainer:
    return L.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                     use_distributed_sampler=False, num_sanity_val_steps=0)  # fmt: skip


def ball_model(centres: np.ndarray, radius_mm: float):
    """A coarse model that sees a ball around each centre (mm; NaN: nothing)."""

    def probabilities(view: View) -> torch.Tensor:
        size = view["image"].shape[2:]
        axes = [torch.arange(n, dtype=torch.float32) for n in (1, *size)]
        index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        to_mm = view["index_to_mm"]
        mm = (index[None] @ to_mm[:, None, None, :3, :3].mT + to_mm[:, None, None, None, :3, 3])[:, 0]
        away = (mm[:, None] - torch.tensor(centres)[None, :, None, None]).norm(dim=-1)
        return torch.where(away <= radius_mm, 0.95, 0.02)

    return probabilities
