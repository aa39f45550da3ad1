"""Tiny data sets for tests: NIfTI files with ellipsoid organs, their dataset.yaml, and caches made of them.

Organs are as large, as dense and on the side where an adult has them, so that an untouched case draws no warning.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from organseg.anatomy import canonical
from organseg.data.manifest import load_manifest
from organseg.data.prepare import prepare
from organseg.volumes import WorkingGrid, write_image, write_label

SHAPE = (12, 32, 32)
SPACING = (10.0, 9.0, 8.0)
LABELS = {2: "liver", 3: "left_kidney", 5: "right_kidney", 7: "spleen"}
"""Integers with gaps, so that nobody takes a file's integer for a channel."""

# Centre (z, y, x) and radii in voxels of SHAPE, HU. x grows to the patient's left.
_ORGANS = {
    "liver": ((7, 13, 9), (5, 8, 7), 100),
    "left_kidney": ((4, 22, 24), (3, 3, 3), 120),
    "right_kidney": ((3, 24, 9), (3, 3, 3), 120),
    "spleen": ((7, 14, 26), (4, 4, 4), 90),
}
AFFINE = np.array([[8.0, 0, 0, -128], [0, 9.0, 0, -144], [0, 0, 10.0, -60], [0, 0, 0, 1]])
"""A file in RAS order: canonical arrays have x and y turned around."""


def make_case(seed: int, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Image int16 and label uint8 in file integers, [Z, Y, X] LPS; organs move a little with the seed."""
    rng = np.random.default_rng([seed, 7])
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    scale = np.array(shape) / SHAPE
    image = rng.normal(-50, 15, shape)
    label = np.zeros(shape, np.uint8)
    for value, organ in LABELS.items():
        centre, radii, hu = _ORGANS[organ]
        moved = (np.array(centre) + rng.uniform(-1, 1, 3)) * scale
        inside = (((grid - moved) / (np.array(radii) * scale)) ** 2).sum(-1) < 1
        inside &= label == 0
        label[inside] = value
        image[inside] += hu + 50
    image[:, :2] = -1000  # air in front
    return np.rint(image).astype(np.int16), label


def write_dataset(
    folder: Path,
    cases: int | Sequence[str] = 4,
    *,
    name: str = "tiny",
    shape: tuple[int, int, int] = SHAPE,
    seed: int = 0,
    labels: Mapping[int, str] = LABELS,
    head: Mapping[str, Any] | None = None,
    entries: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write images, labels and dataset.yaml.

    Args:
        folder: Made if needed.
        cases: Ids, or how many (case0, case1, ...).
        name: Of the data set.
        shape: Of every scan.
        seed: Case i is `make_case(seed + i)`.
        labels: Integer in the files -> organ, by any of its names; organs left out have no voxel in the files.
        head: Further keys at the top of dataset.yaml.
        entries: Case id -> further keys of the case.

    Returns:
        The dataset.yaml.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"case{i}" for i in range(cases)] if isinstance(cases, int) else list(cases)
    listed = []
    table = np.zeros(256, np.uint8)
    for value, organ in labels.items():
        table[[own for own, known in LABELS.items() if known == canonical(organ)]] = value
    for i, case in enumerate(ids):
        image, label = make_case(seed + i, shape)
        write_scan(folder / f"{case}.nii.gz", image)
        write_label_map(folder / f"{case}_label.nii.gz", table[label])
        extra = dict((entries or {}).get(case, {}))
        listed.append({"id": case, "image": f"{case}.nii.gz", "label": f"{case}_label.nii.gz", **extra})
    document = {"name": name, "modality": "CT", "labels": dict(labels), **(head or {}), "cases": listed}
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def write_scan(path: Path, image: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    """[Z, Y, X] LPS -> NIfTI."""
    write_image(path, image, affine)


def write_label_map(path: Path, label: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    """[Z, Y, X] LPS -> NIfTI."""
    write_label(path, label, affine)


def make_cache(dataset: Path, cache: Path, grid: WorkingGrid | None = None) -> Path:
    """Prepare a data set in this process; returns the cache."""
    refused = [case for case in prepare(load_manifest(dataset), cache, grid or WorkingGrid(), 1) if not case.digest]
    assert not refused, refused
    return cache
