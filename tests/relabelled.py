"""A tiny run with two relabelling rounds, made with the project's own writers: voxels that can be counted by hand.

The liver is 4 x 8 x 7 = 224 voxels in three cases, hidden in all; the spleen is hidden too, and nobody finds it. Round
1 adds half of the candidates, round 2 all.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from organseg.curriculum.quality import RoundReport
from organseg.data.cache import CaseArrays, CaseHeader, write_case
from organseg.data.pseudo_labels import PseudoLabels, RoundHeader, write_pseudo_labels

SHAPE, SPACING = (6, 30, 36), (5.0, 4.0, 5.0)
STORED = ("spleen", "left_kidney", "liver")
"""The cache's order."""
ORGANS = ("liver", "left_kidney", "spleen")
"""The run's order."""
BOXES = {
    "liver": np.s_[1:5, 4:12, 3:10],  # low x: the patient's right
    "left_kidney": np.s_[1:4, 18:24, 26:31],
    "spleen": np.s_[2:4, 6:12, 26:32],
}
WRONG = {"toy/a": np.s_[2, 18:22, 20:26], "toy/b": np.s_[3, 20, 20:22]}
"""Candidates of the liver that are none: 24 and 2."""
HIGH = {"toy/a": np.s_[2, 18:20, 20:24], "toy/b": WRONG["toy/b"]}
"""Of these, what the score likes best: 8 and 2."""
FOUND = {"toy/a": BOXES["liver"], "toy/b": np.s_[1:5, 4:8, 3:10], "toy/c": BOXES["liver"]}
"""Candidates of the liver that are right: 224, 112 and 224."""


@dataclass(frozen=True)
class Relabelled:
    """The run and its cache."""

    path: Path
    cache: Path

    def labels(self, index: int, key: str) -> Path:
        return self.path / "pseudo_labels" / f"round_{index}" / f"{key}.h5"

    def table(self, index: int, name: str) -> Path:
        return self.path / f"{3 * index - 1:02d}_round{index}_relabel" / f"{name}.csv"

    def report(self) -> list[str]:
        return sorted(path.name for path in (self.path / "report").iterdir())


def mask(*places: object) -> np.ndarray:
    inside = np.zeros(SHAPE, bool)
    for place in places:
        inside[place] = True
    return inside


def label_map(order: Collection[str], organs: Collection[str]) -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    for organ in organs:
        label[BOXES[organ]] = list(order).index(organ) + 1
    return label


@dataclass(frozen=True)
class Source:
    """Knows what is hidden: `quality.RoundReport` asks it."""

    hidden: bool

    def unknown_organs(self, key: str) -> np.ndarray:
        return np.array([organ != "left_kidney" for organ in ORGANS])

    def hidden_organs(self, key: str) -> np.ndarray:
        return self.unknown_organs(key) & self.hidden

    def hidden_truth(self, key: str) -> np.ndarray:
        return label_map(ORGANS, ("liver", "spleen") if self.hidden else ())

    def voxel_ml(self, key: str) -> float:
        return float(np.prod(SPACING)) / 1000

    def mean_volumes_ml(self) -> tuple[float, ...]:
        return (np.nan, 4.5, np.nan)


def accumulated(key: str) -> tuple[PseudoLabels, RoundHeader]:
    """Round 2 where round 1's additions stay: what that left over is its candidates, and all of it is added."""
    (first, _), (everything, header) = (pseudo_labels(key, index, index / 2, mcp=False) for index in (1, 2))
    candidate = np.where(first.label > 0, 0, everything.candidate).astype(np.uint8)
    rounds = np.where(first.label > 0, 1, everything.round).astype(np.uint8)
    now = (int(candidate.sum()), 0, 0)
    return replace(everything, round=rounds, candidate=candidate), replace(header, candidates=now, added=now)


def pseudo_labels(key: str, index: int, share: float, mcp: bool) -> tuple[PseudoLabels, RoundHeader]:
    """The share of a case's candidates with the highest score, ties by index."""
    candidates = mask(FOUND[key], *([WRONG[key]] if key in WRONG else []))
    probability = np.where(mask(FOUND[key]), 0.7, 0.95).astype(np.float32) * candidates
    score = np.where(mask(FOUND[key]), 0.9, 0.3).astype(np.float32) * candidates
    score[HIGH.get(key, np.s_[:0])] = 0.99
    if mcp:
        score = probability
    places = np.flatnonzero(candidates)
    order = places[np.argsort(-score.ravel()[places], kind="stable")]
    label = np.zeros(SHAPE, np.uint8)
    label.ravel()[order[: int(np.ceil(share * len(places)))]] = 1
    counts = (int(candidates.sum()), 0, 0), (int(label.sum()), 0, 0)
    voxels = PseudoLabels(label, label * np.uint8(index), candidates.astype(np.uint8), score, probability)
    return voxels, RoundHeader(key, ORGANS, index, share, "", *counts)


def make_run(
    folder: Path,
    *,
    truth: bool = True,
    mcp: bool = False,
    accumulate: bool = False,
    shape: tuple[int, int, int] = SHAPE,
) -> Relabelled:
    """A run with rounds and its cache, of this shape; without `truth` no liver and no spleen were ever annotated."""
    run = Relabelled(folder / "runs" / "rounds", folder / "cache")
    run.path.mkdir(parents=True)
    (run.cache / "toy").mkdir(parents=True)
    curriculum = {"rounds": 2, "gamma_max": 1.0, "score": "mcp" if mcp else "confidence"}
    config = {"seed": 0, "data": {"init_args": {"cache": str(run.cache)}}, "curriculum": curriculum}
    (run.path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    known = STORED if truth else STORED[1:2]
    image, label = np.full(shape, 40, np.int16), np.zeros(shape, np.uint8)
    label[tuple(map(slice, SHAPE))] = label_map(STORED, known)
    for key in FOUND:
        header = CaseHeader(
            key=key, patient=key, modality="CT", organs=STORED, annotated=known, spacing=SPACING,
            affine=((5, 0, 0, 0), (0, 4, 0, 0), (0, 0, 5, 0), (0, 0, 0, 1)), source_shape=shape,
            source_spacing=SPACING, image_sha256="", label_sha256="", preprocessing={},
        )  # fmt: skip
        write_case(run.cache / f"{key}.h5", header, CaseArrays(image, label, None))
    for index, share in ((1, 0.5), (2, 1.0)):
        more = accumulate and index == 2
        made = [accumulated(key) if more else pseudo_labels(key, index, share, mcp) for key in FOUND]
        labels = run.path / "pseudo_labels" / f"round_{index}"
        for voxels, round_header in made:
            write_pseudo_labels(labels, round_header, voxels)
        headers = [header for _, header in made]
        report = RoundReport(run.table(index, "").parent, labels, headers, Source(truth))  # type: ignore[arg-type]
        for header in headers:
            report.add(header)
        report.write()
    return run
