"""What a config or a checkpoint may name; more only by `--trust-import MODULE` on the command line (FAULTS.md 4)."""

from collections.abc import Sequence

from organseg.errors import UsageError

MODULES = (
    "organseg",
    "torch.nn",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.strategies",
    "lightning.pytorch.profilers",
)
OPTION = "--trust-import"

_more: list[str] = []
"""That the command line of this process trusts."""


def take_trusted(argv: Sequence[str]) -> list[str]:
    """The words of a command without `--trust-import MODULE` (any number of times), which are remembered.

    Raises:
        UsageError: If no module is named.
    """
    _more.clear()
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, module = word.partition("=")
        if option != OPTION:
            rest.append(word)
            continue
        module = module if equals else next(words, "")
        if not module or module.startswith("-"):
            raise UsageError(f"{OPTION}: name a module, for example {OPTION} my_networks")
        _more.append(module)
    return rest


def trusted() -> list[str]:
    """All modules whose classes may be named."""
    return [*MODULES, *_more]
