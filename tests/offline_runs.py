"""What W&B has written into a run folder, read with other eyes than the product's."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 1 << 15


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, by its own format: a header, then LevelDB's log; a torn end is left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    blocks = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
    blocks[0] = b"\0" * 7 + blocks[0][7:]
    text = b""
    for number, block in enumerate(blocks):
        place = 7 if number == 0 else 0
        while len(block) - place >= 7:
            length, kind = struct.unpack_from("<HB", block, place + 4)
            place += 7 + length
            if kind == 0 or place > len(block):
                return
            text = (text if kind in (3, 4) else b"") + block[place - length : place]
            if kind in (1, 4):
                yield Record.FromString(text)


def files_of(run: Path) -> list[Path]:
    """Of all parts of a run, in the order of their start."""
    return sorted(run.glob("wandb/*run-*/*.wandb"), key=lambda path: path.parent.name)


def logged(run: Path) -> list[tuple[int, str, float]]:
    """Every (step, metric, value) of every part, sorted; what W&B adds itself and what is no number is left out."""
    rows = []
    for path in files_of(run):
        for record in records(path):
            for item in record.history.item:
                (name, *rest) = [*item.nested_key] or [item.key]
                if not name.startswith("_") and not rest:
                    rows.append((record.history.step.num, name, float(json.loads(item.value_json))))
    return sorted(rows)


def config_of(run: Path) -> dict[str, Any]:
    """The config that the last part was begun with."""
    (first,) = [record.run for record in records(files_of(run)[-1]) if record.HasField("run")]
    return {item.key: json.loads(item.value_json) for item in first.config.update if item.key != "_wandb"}


def numbers_of(run: Path) -> list[tuple[int, str, float]]:
    """Every line of `metrics.csv`, sorted."""
    lines = (run / "metrics.csv").read_text().splitlines()[1:]
    return sorted((int(step), name, float(value)) for step, name, value in (line.split(",") for line in lines))
