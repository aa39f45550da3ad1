"""Pseudo-labels of a relabelling round: one sealed file a case, beside the run and never over an annotation.

`RUN/pseudo_labels/round_T/<data set>/<id>.h5` keeps, on the cache's grid, where each voxel's pseudo-label comes from:
`label` [Z, Y, X] (0, or channel + 1), `round` (in which it was added, 0 = not), and of every candidate, added or not,
`candidate` (channel + 1), `score` (that ranked it) and `probability` (of its organ), both averaged around it where the
selection averages. Merging is one rule, `merge`.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organseg.data.cache import organ_counts
from organseg.data.sealed import Kind, PlaneReader, opened, read_header, verify_sealed, write_sealed
from organseg.errors import IntegrityError

SCHEMA = 1
PSEUDO_LABELS = Kind(
    magic=b"organseg pseudo-labels\n",
    what="pseudo-label file",
    remedy="remove the lines from this round's relabelling on in the run's journal.jsonl, and run the same `fit` again",
    required=frozenset({"label", "round", "candidate", "score", "probability", "organ_counts"}),
)


@dataclass(frozen=True)
class RoundHeader:
    """What is known of a case's pseudo-labels beside the voxels.

    Attributes:
        key: `<data set>/<id>`.
        organs: Of the run, in channel order.
        round_index: The round that made them, from 1.
        gamma: Share of each organ's candidates that was added.
        made_by: Digest of all that they follow from.
        candidates: Of each organ.
        added: Of each organ, in this round.
        schema: Version of this layout.
    """

    key: str
    organs: tuple[str, ...]
    round_index: int
    gamma: float
    made_by: str
    candidates: tuple[int, ...]
    added: tuple[int, ...]
    schema: int = SCHEMA


@dataclass(frozen=True)
class PseudoLabels:
    """The voxels, all [Z, Y, X] on the cache's grid; see the module."""

    label: NDArray[np.uint8]
    round: NDArray[np.uint8]
    candidate: NDArray[np.uint8]
    score: NDArray[np.float32]
    probability: NDArray[np.float32]


def merge(label: NDArray[np.uint8], pseudo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Annotations with pseudo-labels where there is none: an annotated or ignored voxel never changes."""
    return np.where(label == 0, pseudo, label)


def path_of(folder: Path, key: str) -> Path:
    """The file of a case in a round's folder."""
    return folder / f"{key}.h5"


def write_pseudo_labels(folder: Path, header: RoundHeader, voxels: PseudoLabels) -> None:
    """Publish a case's pseudo-labels atomically.

    Raises:
        StorageError: If they cannot be written.
    """
    path = path_of(folder, header.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = {"organ_counts": organ_counts(voxels.label, len(header.organs))}
    write_sealed(path, PSEUDO_LABELS, asdict(header), voxels.__dict__, tables)


def read_round_header(folder: Path, key: str) -> RoundHeader:
    """The header of a case's verified file.

    Raises:
        IntegrityError: If it is missing or damaged.
    """
    path = path_of(folder, key)
    verify_sealed(path, PSEUDO_LABELS)
    with opened(path, PSEUDO_LABELS) as file:
        try:
            header = RoundHeader(**read_header(file))
            if header.schema != SCHEMA:
                raise ValueError(f"schema {header.schema}")
            return header
        except (TypeError, ValueError) as error:
            raise PSEUDO_LABELS.broken(path, f"no readable header ({error!r:.80})", f"schema {SCHEMA}") from error


def read_pseudo_labels(folder: Path, key: str) -> PseudoLabels:
    """A case's pseudo-labels.

    Raises:
        IntegrityError: If they are missing or damaged.
    """
    path = path_of(folder, key)
    verify_sealed(path, PSEUDO_LABELS)
    with opened(path, PSEUDO_LABELS) as file:
        return PseudoLabels(**{name: file[name][()] for name in PseudoLabels.__dataclass_fields__})


class RoundLabels:
    """The pseudo-labels of a round, for training: slices by case number, safely across forks.

    Args:
        folder: Of the round.
        keys: Of all training cases.
        relabelled: Those that must have a file; the others have none.

    Raises:
        IntegrityError: If a file is missing or damaged.
    """

    def __init__(self, folder: Path, keys: Sequence[str], relabelled: Collection[str]) -> None:
        self.place = {
            number: place for place, number in enumerate(n for n, key in enumerate(keys) if key in relabelled)
        }
        paths = [path_of(folder, keys[number]) for number in self.place]
        digests, counts = zip(*map(_digest_and_counts, paths), strict=True) if paths else ((), ())
        self.reader = PlaneReader(paths, digests, PSEUDO_LABELS, ("label",))
        self._counts = dict(zip(self.place, counts, strict=True))

    def plane(self, number: int, z: int) -> NDArray[np.uint8] | None:
        """Pseudo-labels [Y, X] of slice z of a case, channel + 1."""
        return self.reader.planes(self.place[number], z)[0] if number in self.place else None

    def box(self, number: int, box: NDArray[Any]) -> NDArray[np.uint8] | None:
        """Pseudo-labels [Z, Y, X] of the part [lo, hi) of a case, channel + 1; `box` is [3, 2] (z, y, x)."""
        return self.reader.boxes(self.place[number], box)[0] if number in self.place else None

    def counts(self, number: int) -> NDArray[np.int32] | None:
        """[Z, K] pseudo-labelled voxels of each organ in each slice of a case."""
        return self._counts.get(number)


def _digest_and_counts(path: Path) -> tuple[str, NDArray[np.int32]]:
    digest = verify_sealed(path, PSEUDO_LABELS)
    with opened(path, PSEUDO_LABELS) as file:
        return digest, file["organ_counts"][()]


def exists(folder: Path, key: str, made_by: str) -> bool:
    """Whether a case has its file of this making already; an unreadable or other one counts as none."""
    if not path_of(folder, key).exists():
        return False
    try:
        return read_round_header(folder, key).made_by == made_by
    except IntegrityError:
        return False
