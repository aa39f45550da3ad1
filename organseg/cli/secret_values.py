"""Keys and passwords come from the environment or from a file of their owner (FAULTS.md 4).

In a command line or a config others read them, and a run keeps both.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from organseg.errors import UsageError

_NAMES = re.compile(r"(.*[._-])?(api[_-]?key|access[_-]?key|secret|token|password|passwd|credentials?)", re.IGNORECASE)
_HARMLESS = re.compile(r"|null|none|true|false", re.IGNORECASE)
_VALUES = re.compile(
    r"(?<![\w./-])((local-)?[0-9a-f]{40}|sk-[\w-]{20,})(?![\w./-])"  # W&B, and others; in a path it is a commit's
    r"|(?<![\w-])("
    r"wandb_v\d_\w{20,}|hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|(AKIA|ASIA)[0-9A-Z]{16}|ey[\w-]{10,}\.ey[\w-]{10,}\.[\w-]+"  # Amazon's; a JSON web token
    r")(?![\w-])"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s:@]+@"
)


def refuse_secrets(given: Mapping[str, Any] | Sequence[str], where: str) -> None:
    """Refuse what looks like a key, without showing it.

    Args:
        given: A config, or the words of a command line.
        where: Where it stands, for the message.

    Raises:
        UsageError: If an option is named like a secret and has a value, or a value has a secret's form.
    """
    pairs = _of_config("", given) if isinstance(given, Mapping) else _of_words(given)
    for name, value in pairs:
        if (_NAMES.fullmatch(name) and not _HARMLESS.fullmatch(value)) or _VALUES.search(value):
            raise UsageError(
                f"{where}: {name or 'a word'}: found what looks like a key or password, expected none where others read"
                " it; give it by the environment (WANDB_API_KEY) or by `wandb login`, and withdraw this one"
            )


def _of_config(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _of_config(f"{name}.{key}".lstrip("."), item)
    elif isinstance(value, list):
        for item in value:
            yield from _of_config(name, item)
    elif value is not None:
        yield name, str(value)


def _of_words(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if equals:
                yield name, value
                name = ""
            continue
        yield name, word
        name = ""
