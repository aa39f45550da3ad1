"""A part of a large cohort: what one task of a job array does, and where the parts meet.

Each shard leaves a record of its cases beside them; whichever finds the records of all of them complete writes the
index, whatever their order. Records of another manifest, grid or number of shards count as none.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from organseg.errors import UsageError
from organseg.files import publish_text

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Every `count`-th item, from `index` on."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From `I/N`.

        Raises:
            UsageError: If it is no such thing.
        """
        first, _, second = text.partition("/")
        if first.isascii() and first.isdigit() and second.isascii() and second.isdigit() and int(first) < int(second):
            return cls(int(first), int(second))
        raise UsageError(f"--shard {text}: expected I/N, I from 0 to N - 1, for example 0/4")

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Its items."""
        return list(items[self.index :: self.count])

    @property
    def name(self) -> str:
        """For files of its own."""
        return f"shard_{self.index}_of_{self.count}"


def record_shard(folder: Path, shard: Shard, made_of: Any, digests: dict[str, str]) -> dict[str, str] | None:
    """Publish what a shard has made; returns what all have made, if this completes them.

    Args:
        folder: Of the data set in the cache.
        shard: This one.
        made_of: Plain values that all shards must agree on.
        digests: Case id -> content hash of its cases that were not refused.
    """
    identity = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
    document = {"made_of": identity, "cases": dict(sorted(digests.items()))}
    publish_text(folder / f"{shard.name}.json", json.dumps(document, indent=1))
    everything: dict[str, str] = {}
    for index in range(shard.count):
        path = folder / f"{Shard(index, shard.count).name}.json"
        try:
            found = json.loads(path.read_text())
            if found["made_of"] != identity:
                return None
            everything |= found["cases"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return everything


def forget_shards(folder: Path) -> None:
    """Remove all records: the whole data set was prepared at once."""
    for path in folder.glob("shard_*_of_*.json"):
        path.unlink(missing_ok=True)
