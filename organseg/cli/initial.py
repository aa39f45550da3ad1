"""`fit --init`: a training that begins with the network of a checkpoint, of the same organs or of others."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from organseg.checkpoints import load_checkpoint
from organseg.errors import IntegrityError, UsageError
from organseg.methods.base import SegmentationModule

_NETWORK = "network."
_HEADS = ("head.", "coarse_heads.")
"""Layers with a row for each organ; names in a network."""


def begin_with(module: SegmentationModule, path: Path) -> tuple[str, ...]:
    """Copy a checkpoint's network into a new module: what each known organ had, others stay as they are.

    Args:
        module: With new weights; any method with a network of the same layers.
        path: Checkpoint of `organseg fit`.

    Returns:
        The organs that begin anew.

    Raises:
        IntegrityError: If the checkpoint is damaged or foreign.
        UsageError: If its network has other layers, or the method begins with another checkpoint already.
    """
    if getattr(module, "start", None) == "coarse":
        raise UsageError("--init: this method begins with its coarse model; set model.init_args.start to scratch")
    checkpoint = load_checkpoint(path)
    record = checkpoint.get("organseg")
    if not isinstance(record, dict):
        raise IntegrityError(f"{path}: not a checkpoint of organseg; train one with `organseg fit`")
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    theirs = {name.removeprefix(_NETWORK): tensor for name, tensor in state.items() if name.startswith(_NETWORK)}
    ours = module.network.state_dict()
    _refuse_other_layers(path, ours, theirs)
    known: Sequence[str] = record["organs"]
    anew = set(module.organs) - set(known)
    with torch.no_grad():
        for name, tensor in ours.items():
            if not _is_head(name):
                tensor.copy_(theirs[name])
            elif len(tensor) - len(module.organs) == len(theirs[name]) - len(known):
                _copy_rows(tensor, module.organs, theirs[name], known)
            else:  # of softmax here and of sigmoids there: it means something else
                anew = set(module.organs)
    return tuple(organ for organ in module.organs if organ in anew)


def _is_head(name: str) -> bool:
    return any(name.startswith(head) or f".{head}" in name for head in _HEADS)


def _copy_rows(tensor: Tensor, organs: Sequence[str], found: Tensor, known: Sequence[str]) -> None:
    """Rows of a head by organ, after those that are none's: the background of a softmax."""
    first = len(tensor) - len(organs)
    tensor[:first] = found[:first]
    for row, organ in enumerate(organs, start=first):
        if organ in known:
            tensor[row] = found[first + known.index(organ)]


def _refuse_other_layers(path: Path, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    def shape(state: Mapping[str, Tensor], name: str) -> str:
        if name not in state:
            return "nothing"
        size = list(state[name].shape)
        return str(size[1:] if _is_head(name) else size)

    names = dict.fromkeys((*ours, *theirs))
    other = [
        f"{name}: {shape(theirs, name)} there, {shape(ours, name)} here"
        for name in names
        if shape(theirs, name) != shape(ours, name)
    ]
    if other:
        more = f"\n  and {len(other) - 3} more" if len(other) > 3 else ""
        raise UsageError(
            f"{path}: another network than this config's; take the checkpoint's (see the config.yaml of its run)\n  "
            + "\n  ".join(other[:3])
            + more
        )
