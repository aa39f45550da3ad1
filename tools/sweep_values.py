"""The values of a sweep file's trials, for the agent without a server in tools/sweep.py."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from organseg.errors import UsageError


def points(sweep: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """The values of each trial: a grid's in the order of the file, its last parameter fastest; else drawn for ever."""
    parameters = sweep["parameters"]
    if sweep["method"] == "grid":
        grid = itertools.product(*(choices(name, item) for name, item in parameters.items()))
        yield from (dict(zip(parameters, point, strict=True)) for point in grid)
        return
    for number in itertools.count():
        chance = random.Random(f"{seed} {number}")
        yield {name: draw(name, item, chance) for name, item in parameters.items()}


def choices(name: str, item: Mapping[str, Any]) -> Sequence[Any]:
    """All values of a parameter in a grid."""
    if "values" in item or "value" in item:
        return list(item.get("values") or [item["value"]])
    if isinstance(item.get("min"), int) and isinstance(item.get("max"), int):
        return range(item["min"], item["max"] + 1)
    raise UsageError(f"parameters.{name}: found {dict(item)}, expected `values` in a grid")


def draw(name: str, item: Mapping[str, Any], chance: random.Random) -> Any:
    """One value of a parameter's range."""
    if "value" in item:
        return item["value"]
    if "values" in item:
        return chance.choices(item["values"], item.get("probabilities"))[0]
    low, high = item.get("min"), item.get("max")
    whole = isinstance(low, int) and isinstance(high, int)
    kind = item.get("distribution", "int_uniform" if whole else "uniform")
    if low is None or high is None or kind not in DRAWN:
        raise UsageError(
            f"parameters.{name}: found {dict(item)}, expected values or a range that `local` can draw from"
        )
    return DRAWN[kind](chance, low, high, item.get("q", 1))


def log_uniform(chance: random.Random, low: float, high: float) -> float:
    """Uniform in the logarithm, and never outside by rounding."""
    return min(max(math.exp(chance.uniform(math.log(low), math.log(high))), low), high)


DRAWN: dict[str, Callable[[random.Random, Any, Any, Any], Any]] = {
    "int_uniform": lambda chance, low, high, q: chance.randint(low, high),
    "uniform": lambda chance, low, high, q: chance.uniform(low, high),
    "q_uniform": lambda chance, low, high, q: round(chance.uniform(low, high) / q) * q,
    "log_uniform_values": lambda chance, low, high, q: log_uniform(chance, low, high),
    "q_log_uniform_values": lambda chance, low, high, q: round(log_uniform(chance, low, high) / q) * q,
}
