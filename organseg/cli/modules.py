"""Methods from plain values: what a config says, or what a checkpoint says of itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from organseg.checkpoints import load_checkpoint
from organseg.cli.trusted import OPTION, trusted
from organseg.curriculum import Curriculum
from organseg.errors import IntegrityError
from organseg.methods.base import SegmentationModule
from organseg.volumes import Preprocessing


def trust() -> None:
    """Let jsonargparse import what is trusted, and nothing else."""
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=trusted())


def explained(said: str) -> str:
    """What jsonargparse says of a class that is not trusted, with our remedy instead of its own."""
    what, denied, _ = said.partition(", denied by the")
    return f"{what}: it is not organseg's; {OPTION} MODULE allows it" if denied else said


def build_module(model: Mapping[str, Any], organs: Sequence[str]) -> SegmentationModule:
    """A new module from its `class_path` and `init_args`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationModule, "model")
    given = {**model, "init_args": {**model["init_args"], "organs": list(organs)}}
    module: SegmentationModule = parser.instantiate(parser.parse_object({"model": given})).model
    return module


def check_curriculum(options: Mapping[str, Any]) -> None:
    """Refuse a curriculum's options before anything else is made.

    Raises:
        UsageError: If they cannot mean what they say.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--curriculum", type=Curriculum)
    parser.instantiate(parser.parse_object({"curriculum": dict(options)}))


def load_module(path: Path) -> SegmentationModule:
    """The method of a checkpoint with its weights, ready to predict.

    Raises:
        IntegrityError: If the checkpoint is damaged, foreign, or names a class that is not trusted.
    """
    checkpoint = load_checkpoint(path)
    record = checkpoint.get("organseg")
    if not isinstance(record, dict):
        raise IntegrityError(f"{path}: not a checkpoint of organseg; train one with `organseg fit`")
    trust()
    try:
        module = build_module(record["model"], record["organs"])
        module.load_state_dict(checkpoint["state_dict"])
    except Exception as error:
        why = explained(" ".join(str(error).split()))
        raise IntegrityError(f"{path}: not a method of this version of organseg: {why}") from error
    module.preprocessing = Preprocessing.from_json(record["preprocessing"])
    return module.eval()
