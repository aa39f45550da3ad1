"""The coarse model of a two-pass method: a run that must not know more than this one (METHOD.md 2.3)."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from organseg.checkpoints import load_checkpoint
from organseg.errors import UsageError
from organseg.volumes import Preprocessing


def coarse_weights(
    path: Path | None, organs: Sequence[str], preprocessing: Preprocessing, content_hash: str
) -> dict[str, Tensor]:
    """The weights of a coarse model's network.

    Args:
        path: Checkpoint of PartialLabelModule.
        organs: Of this run, in channel order.
        preprocessing: Of this run.
        content_hash: Of this run's data, with its split and hidden labels.

    Raises:
        UsageError: If there is none, or its run is not finished, or it is of other organs, data, folds, hidden labels
            or preprocessing.
    """
    if path is None or not Path(path).exists():
        raise UsageError(
            f"model.init_args.coarse: {path or 'nothing'}: no such checkpoint; STIPPLE finds organs by a coarse "
            "model: train one first, for example by the experiment of the same name that ends in `_round0`"
        )
    checkpoint = load_checkpoint(Path(path))
    record = checkpoint.get("organseg")
    if not isinstance(record, dict) or not {"model", "organs", "preprocessing", "identity"} <= record.keys():
        raise UsageError(f"{path}: not a checkpoint of organseg; train one with `organseg fit`")
    method = record["model"]["class_path"]
    if method.rpartition(".")[2] != "PartialLabelModule":
        raise UsageError(f"{path}: found {method}; a coarse model is of PartialLabelModule, without a prior")
    steps, identity = checkpoint.get("global_step"), record["identity"]
    # A curriculum's phases have the steps of round 0 or of a later round, each counted anew.
    ends = [identity[key] for key in ("trainer.max_steps", "curriculum.round_steps") if identity.get(key, -1) > 0]
    # Other files are what a user's callback chose; and a user's callback may end a training early.
    early = any(state.get("stopped") for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict))
    if Path(path).name == "last.ckpt" and ends and steps not in ends and not early:
        raise UsageError(f"{path}: stopped after {steps} of {' or '.join(map(str, ends))} steps; finish that run first")
    same = {
        "organs": record["organs"] == list(organs),
        "preprocessing": Preprocessing.from_json(record["preprocessing"]) == preprocessing,
        "data": identity.get("data content") == content_hash,
    }
    differing = [name for name, equal in same.items() if not equal]
    if differing:
        raise UsageError(
            f"{path}: trained with other {' and '.join(differing)}: it may have seen patients or labels that are "
            "hidden from this run; give a run of the same data, fold, label share and seed"
        )
    return {
        name.removeprefix("network."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("network.")
    }
