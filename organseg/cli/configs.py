"""Config files: plain YAML, composed by `include`, handed to the parser as text so that nothing reads them otherwise.

An experiment names its parts, `include: [../data/btcv.yaml, ../network/unet_s.yaml]` (paths relative to the file that
says so); later parts and the file itself win. Several `--config` compose the same way.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from organseg.cli.secret_values import refuse_secrets
from organseg.errors import UsageError
from organseg.strict_yaml import read_yaml

MAX_INCLUDES = 8


def load_config(path: Path, depth: int = 0) -> dict[str, Any]:
    """One config with its includes merged in.

    Raises:
        UsageError: If it, or a part of it, is not a config.
    """
    if depth > MAX_INCLUDES:
        raise UsageError(f"{path}: `include` is nested deeper than {MAX_INCLUDES} files; does one include itself?")
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise UsageError(f"{path}: expected keys and values, found {document!r:.40}")
    refuse_secrets(document, str(path))
    parts = document.pop("include", [])
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise UsageError(f"{path}: include: expected a list of paths, found {parts!r:.60}")
    merged: dict[str, Any] = {}
    for part in parts:
        merged = merge(merged, load_config(path.parent / part, depth + 1))
    return merge(merged, document)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged, `over` wins; another `class_path` drops the init_args that belonged to the first."""
    result = dict(base)
    if "class_path" in over and over["class_path"] != base.get("class_path", over["class_path"]):
        result.pop("init_args", None)
    for key, value in over.items():
        before = result.get(key)
        result[key] = merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return result


def expand(argv: Sequence[str]) -> list[str]:
    """Replace the config files of a command line by one merged text."""
    rest: list[str] = []
    config: dict[str, Any] = {}
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-c"):
            rest.append(argument)
            continue
        path = value if equals else next(arguments, "")
        if not path:
            raise UsageError("--config needs a file")
        config = merge(config, load_config(Path(path)))
    return [*rest[:1], f"--config={yaml.safe_dump(config)}", *rest[1:]] if config else rest
