"""A synthetic cohort worth training on: CT-like abdomens with the seven organs, deterministic in the seed.

Not METHOD.md's data, but its problem: organs overlap in HU (METHOD.md 0, contrast phases mixed between patients), touch
one another, vary in size, pose and coverage; bowel loops with the pancreas's and the stomach's texture lie elsewhere:
what a voxel looks like does not say what it is, and where it lies does. Positions, sizes and HU follow DATA.md 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from organseg.data import phantom_body, phantom_organs
from organseg.data.manifest import CaseEntry, Manifest, write_manifest
from organseg.data.phantom_mirrored import MIRRORED_LABELS, make_mirrored_case
from organseg.data.phantom_organs import PHANTOM_LABELS
from organseg.data.phantom_patient import Patient, Shape, lay_canvas, sample_patient
from organseg.data.phantom_shapes import Canvas, grain
from organseg.errors import StorageError, UsageError
from organseg.processes import in_processes
from organseg.volumes.nifti import write_image, write_label

__all__ = ["PHANTOM_LABELS", "Phantom", "make_case", "write_cohort"]

_PAINTERS: tuple[Callable[[Canvas, Patient, np.random.Generator], None], ...] = (
    phantom_body.paint_torso,
    phantom_body.paint_skeleton,
    phantom_body.paint_colon,
    phantom_body.paint_small_bowel,
    phantom_body.paint_vessels,
    phantom_organs.paint_stomach,
    phantom_organs.paint_pancreas,
    phantom_organs.paint_liver,
    phantom_organs.paint_spleen,
    phantom_organs.paint_kidneys,
    phantom_organs.paint_gallbladder,
)  # from back to front: each covers what the earlier ones put in its place


@dataclass(frozen=True)
class Phantom:
    """One synthetic case.

    Attributes:
        image: HU, int16 [Z, Y, X], LPS.
        label: Values of `PHANTOM_LABELS`, uint8 [Z, Y, X]; 0 = background.
        spacing: (z, y, x) mm.
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    spacing: tuple[float, float, float]


def make_case(seed: int, index: int, shape: Shape = (96, 128, 128)) -> Phantom:
    """Case `index` of the cohort `seed`: a pure function of its arguments, the same with or without other cases.

    The same (seed, index) in another shape is the same patient, sampled more coarsely or finely, with other noise.

    Args:
        seed: Of the cohort, 0 or more.
        index: Of the case, 0 or more.
        shape: Voxels (Z, Y, X), 16 or more each.

    Raises:
        UsageError: If an argument is out of its range.
    """
    _check(seed, index, shape)
    # a stream of its own for each painter: how much one draws, which depends on what is in view, changes no other
    streams = [np.random.default_rng(part) for part in np.random.SeedSequence((seed, index)).spawn(3 + len(_PAINTERS))]
    patient = sample_patient(streams[0])
    canvas, spacing = lay_canvas(patient, shape, streams[1], streams[2])
    for paint, stream in zip(_PAINTERS, streams[3:], strict=True):
        paint(canvas, patient, stream)
    canvas.hu += patient.noise_hu * grain(streams[2], shape, 0.6)
    return Phantom(np.clip(np.rint(canvas.hu), -1024, 2000).astype(np.int16), canvas.label, spacing)


def write_cohort(
    out: Path,
    *,
    cases: int,
    seed: int,
    shape: Shape = (96, 128, 128),
    mirrored: bool = False,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a cohort as any other data set: `img/`, `label/` and `dataset.yaml` (DESIGN.md 3), every organ annotated.

    Args:
        out: Folder, made if missing; files of the same names are replaced.
        cases: How many.
        seed: The cohort's; case i is `make_case(seed, i, shape)`.
        shape: Voxels (Z, Y, X).
        mirrored: The cohort of `phantom_mirrored.py`, named `mirrored`, instead of the abdomens.
        processes: Cases made at a time; the files do not depend on it.
        progress: Called with (cases done, cases) after each.

    Returns:
        The path of `dataset.yaml`. It is written last: where it exists, so do all its files.

    Raises:
        UsageError: If an argument is out of its range.
        StorageError: If a file cannot be written.
    """
    if cases < 1 or processes < 1:
        raise UsageError(f"phantom: cases {cases} and processes {processes} must be 1 or more")
    _check(seed, 0, shape)
    manifest = out / "dataset.yaml"
    try:
        for folder in ("img", "label"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from error
    for number, _ in enumerate(
        in_processes(partial(_write_case, out, seed, shape, mirrored), range(cases), processes), start=1
    ):
        if progress:
            progress(number, cases)
    root = out.resolve()
    name, labels = ("mirrored", MIRRORED_LABELS) if mirrored else ("phantom", PHANTOM_LABELS)
    everything = frozenset(labels.values())  # also in a case without gallbladder: absent is a known fact
    entries = [
        CaseEntry(case, root / f"img/{case}.nii.gz", root / f"label/{case}.nii.gz", everything, frozenset())
        for case in _names(cases)
    ]
    write_manifest(manifest, Manifest(name, "CT", dict(labels), root, tuple(entries)))
    return manifest


def _check(seed: int, index: int, shape: Shape) -> None:
    if seed < 0 or index < 0 or min(shape) < 16:
        raise UsageError(f"phantom: seed {seed}, index {index} must be 0 or more and shape {shape} 16 or more an axis")


def _names(cases: int) -> list[str]:
    return [f"phantom_{index:03d}" for index in range(cases)]


def _write_case(out: Path, seed: int, shape: Shape, mirrored: bool, index: int) -> None:
    phantom = Phantom(*make_mirrored_case(seed, index, shape)) if mirrored else make_case(seed, index, shape)
    affine = _file_affine(seed, index, phantom.spacing)
    name = _names(index + 1)[-1]
    write_image(out / "img" / f"{name}.nii.gz", phantom.image, affine)
    write_label(out / "label" / f"{name}.nii.gz", phantom.label, affine)


def _file_affine(seed: int, index: int, spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    """A file's voxel (x, y, z) -> world RAS: hospitals differ in axes (LAS, RAS, LPS) and origin, so the files do."""
    signs = ((-1, 1, 1), (1, 1, 1), (-1, -1, 1))[index % 3]
    affine = np.diag([sign * step for sign, step in zip(signs, spacing[::-1], strict=True)] + [1.0])
    affine[:3, 3] = np.round(np.random.default_rng((seed, index, 1)).uniform(-400, 400, 3), 2)
    return affine
