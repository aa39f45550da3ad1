"""A part of a large cohort: what one task of a job array does, and where the parts meet.

Each shard of `prepare` leaves a record of its cases beside them; whichever finds the records of all of them complete
writes the index, whatever their order. Records of another manifest, grid or number of shards count as none. Shards of
`test` leave a record of each case, and whichever finds those of all cases writes the tables.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from organseg.errors import StorageError, UsageError
from organseg.files import publish_text, reap_stale, sha256_of

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
    identity = _hash(made_of)
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


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class CaseResults:
    """Where the shards of a test leave what each case came to: `FOLDER/shards/<data set>/<id>.json`.

    Attributes:
        folder: Of the test; each result belongs to a file somewhere below it.
        shard: The part of the cases that is done here.
        made_of: Plain values that decide the results; what was made of others, or is damaged, counts as none.
    """

    folder: Path
    shard: Shard
    made_of: Any

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Numbers of this shard's cases that are to be done: without a result, or whose file was changed since.

        Args:
            keys: Of all cases, in the order of their numbers.
        """
        for folder in {path.parent for path in self.folder.rglob(".*.tmp")}:
            reap_stale(folder)
        return [number for number in self.shard.of(range(len(keys))) if not self._is_done(keys[number])]

    def write(self, key: str, result: Any, file: Path) -> None:
        """Publish the result of a case, plain values, after its file.

        Raises:
            StorageError: If it cannot be written.
        """
        content = {"result": result, "file": str(file.relative_to(self.folder)), "sha256": sha256_of(file)}
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{path.parent}: cannot be made: {error.strerror}; choose another --out") from error
        publish_text(path, json.dumps({**content, "seal": self._seal(key, content)}, indent=1))

    def read(self, keys: Sequence[str]) -> dict[str, Any]:
        """Case -> result, of those cases of all shards that are done."""
        found = {key: self._read(key) for key in keys}
        return {key: content["result"] for key, content in found.items() if content is not None}

    def progress(self, keys: Sequence[str], found: Mapping[str, Any]) -> str:
        """How far all shards are together, in words."""
        shards = [Shard(index, self.shard.count).of(keys) for index in range(self.shard.count)]
        complete = sum(all(key in found for key in part) for part in shards)
        foreign = sum(key not in found and self._path(key).exists() for key in keys)
        others = f", {foreign} results were made by another config, checkpoint, precision or number of shards"
        return (
            f"{complete} of {self.shard.count} shards are complete, {len(found)} of {len(keys)} cases are done"
            f"{others if foreign else ''}"
        )

    def _is_done(self, key: str) -> bool:
        content = self._read(key)
        try:
            return content is not None and sha256_of(self.folder / content["file"]) == content["sha256"]
        except OSError:
            return False

    def _read(self, key: str) -> dict[str, Any] | None:
        """A result with what belongs to it."""
        try:
            content: dict[str, Any] = json.loads(self._path(key).read_text())
            seal = content.pop("seal")
            return content if seal == self._seal(key, content) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _seal(self, key: str, content: Mapping[str, Any]) -> str:
        return _hash([self.made_of, self.shard.count, key, content])

    def _path(self, key: str) -> Path:
        return self.folder / "shards" / f"{key}.json"


def forget_results(folder: Path) -> None:
    """Remove the results that shards left in the folder of a test: all of it is done at once."""
    shutil.rmtree(folder / "shards", ignore_errors=True)
