"""Reading YAML that somebody else wrote: plain values only, and nothing silently lost.

Refused: tags, aliases (alias bombs), duplicate keys, numbers that are not finite, files over a limit, deep nesting
(FAULTS.md 4). Only plain decimal integers are integers: a case id 0012 or 12:30 stays text, as dates do.
"""

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from organseg.errors import UsageError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32


_INT = "tag:yaml.org,2002:int"
_OTHERWISE = (_INT, "tag:yaml.org,2002:timestamp")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses tags, aliases, duplicate keys, infinite numbers and deep nesting."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHERWISE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        if getattr(self.peek_event(), "tag", None) is not None:  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="tags are not allowed", problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(problem="a key must be a plain value", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value: float = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.MarkedYAMLError(problem="a number must be finite", problem_mark=node.start_mark)
        return value


_StrictLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)


def parse_yaml(text: str, source: str) -> Any:
    """Plain values of a YAML text.

    Raises:
        UsageError: If it is not plain YAML; `source` names it.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise UsageError(f"{source}: not plain YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Plain values of a YAML file; see `parse_yaml`."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UsageError(f"{path}: {size} bytes, more than the {max_bytes} that a file of this kind may have")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
