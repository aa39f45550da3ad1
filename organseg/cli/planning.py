"""`organseg plan`: the sizes of an nnU-Net for prepared data sets, as a config to add to an experiment."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from organseg.data.fingerprint import FILE, read_fingerprint
from organseg.errors import UsageError
from organseg.networks.nnunet_plan import plan


def plan_config(arguments: Namespace) -> str:
    """The config as YAML.

    Raises:
        UsageError: If nothing is prepared, or nothing fits into the memory.
        IntegrityError: If a fingerprint is missing or damaged.
    """
    cache, dims, width = Path(arguments.cache), arguments.dims, arguments.width
    named = [cache / name for name in arguments.datasets or []]
    folders = named or sorted(path.parent for path in cache.glob(f"*/{FILE}"))
    if not folders:
        raise UsageError(f"{cache}: no prepared data set; `organseg prepare DATASET.yaml --out {cache}` makes one")
    found = read_fingerprint(folders)
    try:
        planned = plan(
            found.median_shape[-dims:], found.median_spacing[-dims:], arguments.memory_gb, width, whole=dims == 2
        )
    except ValueError as error:
        raise UsageError(f"plan: {error}") from error
    data: dict[str, Any] = {"batch_size": planned.batch_size}
    if dims == 3:
        data["patch_size"] = planned.patch_size
    size, levels = {"dims": dims, "width": width}, {"strides": planned.strides, "kernels": planned.kernels}
    network: dict[str, Any] = {"class_path": "organseg.networks.NNUNet", "init_args": {**size, **levels}}
    if arguments.transformer:
        network = {"backbone": "nnunet", **size, "options": levels}
    config = {"data": {"init_args": data}, "model": {"init_args": {"network": network}}}
    kind = f"{'PatchDataModule' if dims == 3 else 'SliceDataModule'}" + " and TransformerModule" * arguments.transformer
    names = ", ".join(folder.name for folder in folders)
    return (
        f"# nnU-Net for {names}: {len(found.shapes)} cases, median {_times(found.median_shape)} voxels of "
        f"{_times(found.median_spacing)} mm.\n"
        f"# About {planned.memory_gb:.1f} GB in training. Use: fit --config EXPERIMENT.yaml --config THIS.yaml, where\n"
        f"# the experiment has {kind}.\n"
        # JSON first: YAML would write tuples as Python's.
        f"{yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, default_flow_style=None)}"
    )


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{n:.4g}" for n in numbers)
