"""`organseg plan`: the sizes of an nnU-Net for prepared data sets, as a config to add to an experiment."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from organseg.data.cache import CachedCase, case_files
from organseg.data.fingerprint import FILE, read_fingerprint
from organseg.errors import IntegrityError, UsageError
from organseg.networks.nnunet_plan import ATTENTION_LEVELS, Training, plan

VALUE_BYTES = {"bf16-mixed": 2, "32-true": 4}
"""Of a feature map's value, by the trainer's precision."""


_FALLBACK = (
    "# A CPU without bfloat16 computes in 32-true and takes about twice as much: --precision 32-true plans for that.\n"
)


def plan_config(arguments: Namespace) -> str:
    """The config as YAML.

    Raises:
        UsageError: If nothing is prepared, or nothing fits into the memory.
        IntegrityError: If a fingerprint or a case is missing or damaged.
    """
    cache, dims, width = Path(arguments.cache), arguments.dims, arguments.width
    named = [cache / name for name in arguments.datasets or []]
    folders = named or sorted(path.parent for path in cache.glob(f"*/{FILE}"))
    if not folders:
        raise UsageError(f"{cache}: no prepared data set; `organseg prepare DATASET.yaml --out {cache}` makes one")
    found, organs = read_fingerprint(folders), _organs(folders)
    training = Training(
        width,
        channels=len(organs) + arguments.transformer,
        residual=arguments.residual,
        attention=arguments.transformer,
        value_bytes=VALUE_BYTES[arguments.precision],
    )
    try:
        planned = plan(
            found.median_shape[-dims:], found.median_spacing[-dims:], arguments.memory_gb, training, whole=dims == 2
        )
    except ValueError as error:
        raise UsageError(f"plan: {error}") from error
    data: dict[str, Any] = {"batch_size": planned.batch_size}
    if dims == 3:
        data["patch_size"] = planned.patch_size
    size: dict[str, Any] = {"dims": dims, "width": width}
    levels: dict[str, Any] = {"strides": planned.strides, "kernels": planned.kernels}
    if arguments.residual:
        levels["residual"] = True
    model: dict[str, Any] = {
        "network": {"class_path": "organseg.networks.NNUNet", "init_args": {**size, **levels}},
    }
    if arguments.transformer:
        model = {"network": {"backbone": "nnunet", **size, "options": levels}}
        if len(planned.strides) < ATTENTION_LEVELS:
            model["levels"] = len(planned.strides) - 1
    config = {
        "data": {"init_args": data},
        "model": {"init_args": model},
        "trainer": {"precision": arguments.precision},
    }
    kind = f"{'PatchDataModule' if dims == 3 else 'SliceDataModule'}" + " and TransformerModule" * arguments.transformer
    names = ", ".join(folder.name for folder in folders)
    return (
        f"# nnU-Net for {names}: {len(found.shapes)} cases, median {_times(found.median_shape)} voxels of "
        f"{_times(found.median_spacing)} mm, {len(organs)} organs.\n"
        f"# About {planned.memory_gb:.1f} GB in training. Use: fit --config EXPERIMENT.yaml --config THIS.yaml, where\n"
        f"# the experiment has {kind}.\n{_FALLBACK * (arguments.precision == 'bf16-mixed')}"
        # JSON first: YAML would write tuples as Python's.
        f"{yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, default_flow_style=None)}"
    )


def _organs(folders: Sequence[Path]) -> set[str]:
    """All that the data sets name; the cases of one name the same.

    Raises:
        IntegrityError: If there is no case, or a damaged one.
    """
    organs: set[str] = set()
    for folder in folders:
        first = next(case_files(folder), None)
        if first is None:
            raise IntegrityError(f"{folder}: no cases beside {FILE}; run `organseg prepare` again")
        organs.update(CachedCase(first).header.organs)
    return organs


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{n:.4g}" for n in numbers)
