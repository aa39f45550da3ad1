"""The cases of one run: which organs, who trains, validates and tests, and what each case is allowed to show.

A label in the cache has its data set's integers; a run has its own organs in its own channel order.
`CohortCase.lookup` is the only translation between the two, and hiding a label (METHOD.md 1.4) happens there too: what
is hidden is 0 before any batch, loss or curriculum sees it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organseg.anatomy import canonical
from organseg.batch import IGNORE
from organseg.data.cache import SCHEMA, CachedCase
from organseg.data.folds import Split, hold_out, split
from organseg.data.partial import hide_labels
from organseg.errors import IntegrityError, UsageError
from organseg.files import publish_text


@dataclass(frozen=True)
class CohortCase:
    """A cached case as this run may use it.

    Attributes:
        cached: The file.
        key: `<data set>/<id>`.
        annotated: Organs of the run whose truth this run may know here.
        organs: The run's organs, in channel order.
    """

    cached: CachedCase
    key: str
    annotated: frozenset[str]
    organs: tuple[str, ...]

    @property
    def known(self) -> NDArray[np.bool_]:
        """[K] bool, in channel order."""
        return np.array([organ in self.annotated for organ in self.organs])

    @property
    def lookup(self) -> NDArray[np.uint8]:
        """[256]: label value in the cache -> label value of the run; hidden and foreign organs become 0."""
        table = np.zeros(256, dtype=np.uint8)
        table[IGNORE] = IGNORE
        for value, organ in enumerate(self.cached.header.organs, start=1):
            if organ in self.annotated:
                table[value] = self.organs.index(organ) + 1
        return table

    def columns(self) -> list[tuple[int, int]]:
        """Pairs (channel of the run, column in the cache's organ tables) of the organs that this run may know."""
        stored = self.cached.header.organs
        return [(self.organs.index(organ), stored.index(organ)) for organ in stored if organ in self.annotated]

    def centres(self) -> NDArray[np.float32]:
        """[K, 3] mm (z, y, x) from the first voxel: centre of each known organ's bounding box, NaN where unknown."""
        centres = np.full((len(self.organs), 3), np.nan, dtype=np.float32)
        for channel, column in self.columns():
            box = self.cached.organ_boxes[column]
            if box.any():
                centres[channel] = (box[:, 0] + box[:, 1] - 1) / 2 * np.asarray(self.cached.header.spacing)
        return centres


@dataclass(frozen=True)
class Cohort:
    """The cases of one fold, or of a run with test data sets. Test cases keep all their labels."""

    organs: tuple[str, ...]
    train: tuple[CohortCase, ...]
    val: tuple[CohortCase, ...]
    test: tuple[CohortCase, ...]

    @property
    def content_hash(self) -> str:
        """Of all cases' bytes, of what each may show, and of the split."""
        parts = [
            [(case.key, case.cached.digest, sorted(case.annotated)) for case in part]
            for part in (self.train, self.val, self.test)
        ]
        return hashlib.sha256(json.dumps([self.organs, parts]).encode()).hexdigest()


@dataclass(frozen=True)
class CohortOptions:
    """What decides a cohort; the options of the data modules, spelled as there."""

    cache: Path
    datasets: Sequence[str] | None
    organs: Sequence[str] | None
    fold: int | None
    folds: int
    fold_seed: int
    val_share: float
    label_share: float
    seed: int
    test_datasets: Sequence[str] | None = None


def load_cohort(options: CohortOptions) -> Cohort:
    """Read the cache's indices and headers, split by patient, hide labels.

    Raises:
        UsageError: If the cache, a data set or an organ does not exist.
        IntegrityError: If a data set is not completely prepared, or a file is damaged.
    """
    names, held = datasets_of(options)
    learned = {case.header.key: case for name in names for case in read_index(options.cache / name)}
    tested = {case.header.key: case for name in held for case in read_index(options.cache / name)}
    cases = learned | tested
    organs = _organs(options, learned, tested)
    patients = {key: case.header.patient for key, case in cases.items()}
    if held or options.fold is None:
        parts = hold_out(patients, tested, val_share=options.val_share, seed=options.seed)
    else:
        parts = split(
            patients,
            fold=options.fold,
            folds=options.folds,
            fold_seed=options.fold_seed,
            val_share=options.val_share,
            seed=options.seed,
        )
    _check_overlap(cases, parts)
    everything = {key: frozenset(case.header.annotated) & frozenset(organs) for key, case in cases.items()}
    shown = hide_labels({key: everything[key] for key in parts.train + parts.val}, options.label_share, options.seed)

    def members(keys: Sequence[str], annotated: dict[str, frozenset[str]]) -> tuple[CohortCase, ...]:
        return tuple(CohortCase(cases[key], key, annotated[key], organs) for key in keys)

    return Cohort(organs, members(parts.train, shown), members(parts.val, shown), members(parts.test, everything))


def _check_overlap(cases: Mapping[str, CachedCase], parts: Split) -> None:
    """Refuse one image on both sides of a split, under whatever names it is there."""
    place: dict[str, tuple[str, str]] = {}
    for name, keys in (("training", parts.train), ("validation", parts.val), ("test", parts.test)):
        for key in keys:
            image = cases[key].header.image_sha256
            other, twin = place.setdefault(image, (name, key))
            if other != name:
                raise UsageError(
                    f"{twin} ({other}) and {key} ({name}) are the same image: give both the same `patient` in their "
                    "dataset.yaml, or drop one, and prepare again"
                )


def datasets_of(options: CohortOptions) -> tuple[list[str], list[str]]:
    """The data sets to train on (where none is tested as a whole, also to test on), and those to test on.

    Raises:
        UsageError: If there is none, or one does not exist.
    """
    found = sorted(path.parent.name for path in options.cache.glob("*/index.json"))
    if not found:
        raise UsageError(f"{options.cache}: no prepared data set here; run `organseg prepare DATASET.yaml --out ...`")
    held = list(options.test_datasets or ())
    missing = sorted({*(options.datasets or ()), *held} - set(found))
    if missing:
        raise UsageError(f"{options.cache}: no data set {', '.join(missing)}; prepared here: {', '.join(found)}")
    names = [name for name in options.datasets or found if name not in held]
    if not names:
        raise UsageError(f"test_datasets: {', '.join(held)} are all there is; name others to train on in `datasets`")
    return names, held


def _organs(
    options: CohortOptions, learned: Mapping[str, CachedCase], tested: Mapping[str, CachedCase]
) -> tuple[str, ...]:
    """The run's organs, in channel order; by default those that can be learned."""
    known = tuple(dict.fromkeys(organ for case in learned.values() for organ in case.header.organs))
    if not options.organs:
        return known
    offered = dict.fromkeys((*known, *(organ for case in tested.values() for organ in case.header.organs)))
    organs = tuple(canonical(organ, offered) for organ in options.organs)
    double = sorted({organ for organ in organs if organs.count(organ) > 1})
    if double:
        raise UsageError(f"organs: {', '.join(double)} given twice")
    missing = [organ for organ in organs if organ not in offered]
    if missing:
        raise UsageError(
            f"organs: no data set in {options.cache} labels {', '.join(missing)}; labelled: {', '.join(offered)}"
        )
    return organs


def write_index(folder: Path, digests: dict[str, str]) -> None:
    """Publish which cases a prepared data set has; id -> content hash. Written last: it marks completion."""
    document = {"schema": SCHEMA, "cases": dict(sorted(digests.items()))}
    publish_text(folder / "index.json", json.dumps(document, indent=1))


def read_digests(folder: Path) -> dict[str, str]:
    """What the index of a prepared data set says: id -> content hash, sorted by id.

    Raises:
        IntegrityError: If the index is missing or damaged.
    """
    path = folder / "index.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        listed: dict[str, str] = dict(document["cases"])
        if document["schema"] != SCHEMA:
            raise IntegrityError(f"{path}: schema {document['schema']}, this version reads {SCHEMA}; prepare again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: no readable index ({error!r}); run `organseg prepare` again") from error
    return dict(sorted(listed.items()))


def read_index(folder: Path) -> list[CachedCase]:
    """The verified cases of one prepared data set, sorted by id.

    Raises:
        IntegrityError: If the index is damaged, or a file is not the one that it names.
    """
    listed = read_digests(folder)
    cases = [CachedCase(folder / f"{name}.h5") for name in listed]
    changed = [case.path.stem for case in cases if case.digest != listed[case.path.stem]]
    if changed:
        raise IntegrityError(
            f"{folder / 'index.json'}: {', '.join(changed)} changed since the last complete preparation; run "
            "`organseg prepare` again"
        )
    return cases
