"""Mixed precision where the hardware has it.

On a CPU without 16-bit arithmetic, bfloat16 is computed in software: a training step of a U-Net then takes ten times as
long as in float32. GPUs of before Ampere emulate it too.
"""

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from organseg.errors import UsageError

if TYPE_CHECKING:  # `doctor` looks at this machine before it trusts that library
    import lightning as L

BF16 = "bf16-mixed"
FP32 = "32-true"
_FP16 = ("16", "16-mixed")
_HALF_WEIGHTS = ("16-true", "bf16-true")


def affordable_precision(precision: Any, accelerator: Any) -> Any:
    """The precision to compute in; `32-true` where `bf16-mixed` would be computed in software, and that is said.

    Args:
        precision: The trainer's option.
        accelerator: The trainer's option.

    Raises:
        UsageError: If it is float16 on a CPU, where Lightning would compute in something else without a word, or
            weights would be of 16 bits, which take no whole case.
    """
    if str(precision) in _HALF_WEIGHTS:
        raise UsageError(f"precision: found {precision}, expected weights of 32 bits; take {BF16} or 16-mixed")
    cpu = accelerator == "cpu" or (accelerator == "auto" and not _accelerated())
    if cpu and str(precision) in _FP16:
        raise UsageError(
            f"precision: found {precision} on a CPU, expected one that a CPU trains in; take {BF16} or {FP32}"
        )
    if precision != BF16:
        return precision
    if cpu and not bf16_in_hardware():
        found, advice = "this CPU has", ""
    elif accelerator in ("auto", "gpu", "cuda") and old_gpu():
        found, advice = "this GPU has", "; 16-mixed is faster there"
    else:
        return precision
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"organseg: {found} no bfloat16 arithmetic: {FP32} instead of {BF16}{advice}", file=sys.stderr)
    return FP32


def bf16_in_hardware() -> bool:
    """Whether this CPU has instructions for bfloat16 that torch's convolutions use."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return bool(not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def old_gpu() -> bool:
    """Whether torch trains on a GPU of before Ampere, on which it emulates bfloat16."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def _accelerated() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def machine(trainer: "L.Trainer") -> str:
    """What a trainer computes on, for people; a GPU that lies idle beside the CPU is told too."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        idle = Path("/dev/nvidiactl").exists() and trainer.world_size == 1 and not torch.cuda.is_available()
        why = "; there is a GPU that torch cannot use: `organseg doctor` says why" if idle else ""
        return f"{trainer.world_size} x {device.type}, {trainer.precision}{why}"
    return f"{trainer.world_size} x {torch.cuda.get_device_name(device)}, {trainer.precision}"
