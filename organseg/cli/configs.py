"""Config files: plain YAML, composed by `include`, handed to the parser as text so that nothing reads them otherwise.

An experiment names its parts, `include: [../data/btcv.yaml, ../network/unet_s.yaml]` (paths relative to the file that
says so); later parts and the file itself win. Several `--config` compose the same way.
"""

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from organseg.cli.secret_values import refuse_secrets
from organseg.errors import UsageError
from organseg.strict_yaml import read_yaml

MAX_INCLUDES = 8
_NOT_OF_FIT = ("ckpt_path", "weights_only")
_OPTIONS = "init_args"
_OWNED = {"class_path": _OPTIONS, "backbone": "options"}
"""What belongs to the value of a key beside it, and goes with that."""


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
    """Nested mappings merged, `over` wins; another `class_path` drops the init_args that belonged to the first.

    Likewise another `backbone` drops the backbone's `options`.
    """
    result = dict(base)
    for owner, owned in _OWNED.items():
        if owner in over and over[owner] != base.get(owner, over[owner]):
            result.pop(owned, None)
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
        more = load_config(Path(path))
        _tell_dropped(config, more, path)
        config = merge(config, more)
    if rest[:1] == ["fit"]:  # which takes no checkpoint to go on from, as older configs say with null
        config = {key: value for key, value in config.items() if value is not None or key not in _NOT_OF_FIT}
    rest = _keep_neighbours(rest, config)
    return [*rest[:1], f"--config={yaml.safe_dump(config)}", *rest[1:]] if config else rest


def _tell_dropped(config: Mapping[str, Any], more: Mapping[str, Any], path: str) -> None:
    """Another method or data module takes nothing over from the one before it: told where that had options."""
    for part in ("model", "data"):
        before, after = config.get(part) or {}, more.get(part) or {}
        another = before.get("class_path") and after.get("class_path") not in (None, before["class_path"])
        dropped = sorted({*(before.get(_OPTIONS) or {})} - {*(after.get(_OPTIONS) or {})}) if another else []
        if dropped:
            gone = f"{', '.join(dropped)} of the configs before it no longer hold; give those configs after it"
            print(f"organseg: warning: {path} has another {part}.class_path: {gone}", file=sys.stderr)


def _keep_neighbours(words: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Words that set a key of a mapping inside a mapping (`...network.options.norm`) as words that set the outer one.

    The parser would replace the inner mapping by the one key; so what else the config and earlier words say is kept,
    but for the options of another backbone.
    """
    state = copy.deepcopy(dict(config))
    kept: list[str] = []
    arguments = iter(words)
    for argument in arguments:
        kept.append(argument)
        key, equals, value = argument.partition("=")
        names = _full_name(state, key.removeprefix("--").split("."))
        inside = names[::-1].index(_OPTIONS) if _OPTIONS in names else 0
        if not key.startswith("--") or not (inside or names[0] in ("model", "data")):
            continue
        if not equals:
            following = next(arguments, None)
            if following is None:
                break
            value = following
            kept.append(value)
        backbone = names[-1] == "backbone" and _at(state, names) not in (None, value)
        _set(state, names, _typed(value))
        if inside > 2 or backbone:
            outer = names[: 1 - inside]
            whole = yaml.safe_dump(_at(state, outer), default_flow_style=True, width=math.inf).strip()
            kept[-1 if equals else -2 :] = [f"--{'.'.join(outer)}={whole}"]
    return kept


def _full_name(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The names of an option with `init_args` where the command line may leave it out."""
    full: list[str] = []
    for name in names:
        here = _at(config, full)
        of_class = isinstance(here, Mapping) and "class_path" in here
        if full and name == _OPTIONS and isinstance(here, Mapping) and not {_OPTIONS, "class_path"} & here.keys():
            continue  # the parser takes it for the mapping itself
        if of_class and name not in ("class_path", _OPTIONS):
            full.append(_OPTIONS)
        full.append(name)
    return full


def _at(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    value: Any = config
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _set(config: dict[str, Any], names: Sequence[str], value: Any) -> None:
    for name in names[:-1]:
        if not isinstance(config.get(name), dict):
            config[name] = {"class_path": config[name]} if isinstance(config.get(name), str) else {}
        config = config[name]
    if config.get(names[-1], value) != value:
        config.pop(_OWNED.get(names[-1], ""), None)
    config[names[-1]] = value


def _typed(text: str) -> Any:
    """A value of the command line as YAML has it."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # of a date that there is not
        return text
