"""Who lies in the synthetic scanner: contrast phase, size, pose, fat and coverage of one patient of `phantom.py`."""

from dataclasses import dataclass

import numpy as np

from organseg.data.phantom_shapes import Canvas, grain, rotation, value_noise

Shape = tuple[int, int, int]

# HU of a tissue without contrast, and in the arterial, portal-venous and late phase
_PHASES: dict[str, tuple[float, float, float, float]] = {
    "liver": (57, 70, 99, 86),
    "spleen": (48, 118, 107, 86),
    "cortex": (34, 170, 142, 128),
    "medulla": (29, 75, 126, 130),
    "pancreas": (42, 98, 84, 66),
    "artery": (42, 280, 134, 104),
    "vein": (41, 90, 124, 103),
    "portal": (41, 115, 146, 106),
    "bowel": (38, 86, 80, 62),
    "muscle": (46, 54, 60, 57),
}
_PHASE_SHARES = (0.14, 0.16, 0.52, 0.18)


@dataclass(frozen=True)
class Patient:
    """What differs between patients and is not a random detail of one organ.

    Attributes:
        hu: Mean HU of each tissue.
        scale: Size (z, y, x) relative to the reference body.
        tilt: Degrees about z, y and x.
        fat_mm: Thickness of the subcutaneous fat.
        wall_mm: Thickness of the muscle wall at the flanks.
        cavity_mm: Half depth and half width of the trunk within the wall.
        top_mm: Where the scan's coverage ends, above the kidneys.
        height_mm: Coverage in z.
        field_mm: Width of the field of view.
        noise_hu: Standard deviation of the scanner's noise.
        positive_contrast: The patient drank a bright contrast medium.
        has_gallbladder: False where it was removed.
    """

    hu: dict[str, float]
    scale: tuple[float, float, float]
    tilt: tuple[float, float, float]
    fat_mm: float
    wall_mm: float
    cavity_mm: tuple[float, float]
    top_mm: float
    height_mm: float
    field_mm: float
    noise_hu: float
    positive_contrast: bool
    has_gallbladder: bool


def sample_patient(rng: np.random.Generator) -> Patient:
    """Draw a patient."""
    phase, share = rng.choice(4, p=_PHASE_SHARES), rng.uniform(0.35, 1)
    hu = {
        tissue: float(phases[2] + share * (phases[phase] - phases[2]) + rng.normal(0, 5))
        for tissue, phases in _PHASES.items()
    }
    if rng.random() < 0.15:
        hu["liver"] -= rng.uniform(15, 35)  # steatosis
    hu["bile"] = rng.uniform(2, 24)
    size = rng.normal(1, 0.05)
    obesity = rng.beta(1.6, 2.4)
    top = rng.uniform(92, 200)
    height = min(240 + 110 * rng.beta(1, 1.6), top + 175)
    width = 2 * (150 + 12 * obesity + 11 + 8 + 32 * obesity)
    return Patient(
        hu=hu,
        scale=(size * rng.normal(1, 0.04), size * rng.normal(1, 0.03), size * rng.normal(1, 0.03)),
        tilt=(rng.normal(0, 4), rng.normal(0, 2), rng.normal(0, 3)),
        fat_mm=7 + 34 * obesity,
        wall_mm=rng.uniform(9, 13),
        cavity_mm=(86 + 26 * obesity + rng.normal(0, 3), 141 + 12 * obesity + rng.normal(0, 3)),
        top_mm=top,
        height_mm=height,
        field_mm=float(np.clip(size * width * rng.uniform(0.98, 1.16), 282, 400)),
        noise_hu=rng.uniform(11, 20),
        positive_contrast=bool(rng.random() < 0.25),
        has_gallbladder=bool(rng.random() >= 0.12),
    )


def lay_canvas(
    patient: Patient, shape: Shape, body: np.random.Generator, texture: np.random.Generator
) -> tuple[Canvas, tuple[float, float, float]]:
    """Lay the voxel grid over the patient: pose, size, and a smooth deformation of some mm."""
    pixel = patient.field_mm / shape[2]
    spacing = (round(patient.height_mm / shape[0], 4), round(pixel, 4), round(pixel, 4))
    depth = 66 - patient.cavity_mm[0]
    middle = (depth * patient.scale[1] + body.normal(0, 6), body.normal(0, 6))
    first = (
        patient.top_mm - patient.height_mm,
        middle[0] - spacing[1] * (shape[1] - 1) / 2,
        middle[1] - spacing[2] * (shape[2] - 1) / 2,
    )
    z, y, x = (
        (start + step * np.arange(size, dtype=np.float32)).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, (start, step, size) in enumerate(zip(first, spacing, shape, strict=True))
    )
    turn = rotation(patient.tilt)
    inverse = (turn.T / np.array(patient.scale)[:, None]).astype(np.float32).tolist()
    place = [
        np.asarray(z * row[0] + y * row[1] + x * row[2] + np.float32(3.2) * value_noise(body, shape, (4, 4, 4)))
        for row in inverse
    ]
    forward = (turn * np.array(patient.scale)[None]) / np.array(spacing)[:, None]
    canvas = Canvas(
        z=place[0],
        y=place[1],
        x=place[2],
        up=-y,
        across=x,
        corners=(forward, -np.array(first) / np.array(spacing)),
        edge_mm=1.15 * pixel,
        soft=grain(texture, shape, 1.3),
        broad=value_noise(body, shape, (7, 9, 9)),
    )
    return canvas, spacing
