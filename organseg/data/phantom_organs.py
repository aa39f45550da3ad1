"""The seven organs of `phantom.py`: shape, place, texture and label.

Positions are (z, y, x) mm in the reference body: z = 0 at the kidneys, y = 0 at the aorta, x = 0 at the spine.
"""

import numpy as np

from organseg.anatomy import SEVEN_ORGANS
from organseg.data.phantom_body import paint_gut, paint_lobules
from organseg.data.phantom_patient import Patient
from organseg.data.phantom_shapes import Array, Box, Canvas, course_of, jitter, smooth_max, smooth_min, spline

PHANTOM_LABELS: dict[int, str] = dict(enumerate(SEVEN_ORGANS, start=1))
"""Integer in the label maps -> organ."""

_LABEL = {organ: value for value, organ in PHANTOM_LABELS.items()}


# Courses of (z, y, x, radius), from the start of an organ to its end.
_STOMACH = (
    (98, 22, 68, 30), (86, 4, 68, 36), (67, -36, 62, 31), (44, -64, 42, 25), (26, -70, 10, 21), (26, -64, -18, 12),
)  # fmt: skip
_PANCREAS = (
    (-18, -8, -30, 13), (4, -20, -28, 17), (20, -34, -8, 11), (26, -34, 18, 12), (30, -14, 46, 13), (40, 12, 76, 12),
)  # fmt: skip
_GALLBLADDER = ((28, -36, -50, 5), (16, -50, -60, 9), (0, -64, -68, 12), (-12, -74, -72, 10))
_CAVA = (
    (-230, -12, -12, 8), (-110, -2, -14, 11), (0, -2, -20, 11), (60, -2, -26, 12), (112, -4, -28, 13),
    (142, -22, -14, 12),
)  # fmt: skip
_HEPATIC_VEINS = (
    ((112, 2, -26, 8), (105, -8, -70, 5), (82, -2, -118, 3)),
    ((112, 2, -26, 8), (102, -35, -62, 5), (80, -70, -82, 3)),
    ((112, 2, -26, 8), (105, -35, -20, 5), (95, -72, 10, 3)),
)
_PORTAL_VEINS = (
    ((50, -20, -42, 8), (55, -12, -80, 6), (35, 5, -115, 3)),
    ((50, -20, -42, 8), (70, -45, -20, 6), (80, -62, 12, 3)),
    ((52, -14, -75, 6), (80, -30, -105, 4), (95, -40, -120, 3)),
)


def paint_stomach(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """A curved bag from the left dome across the midline; the fuller, the thinner its wall."""
    fill, gas = float(rng.uniform(0.8, 1.2)), min(float(rng.beta(1.2, 10)), 0.25)
    drunk = "contrast" if patient.positive_contrast and rng.random() < 0.5 else "fluid"
    box, tube = c.tube(course_of(rng, [(z, y, x, r * fill) for z, y, x, r in _STOMACH], 6))
    tube = np.maximum(tube + 2.2 * c.broad[box], c.cavity[box] + 2)
    c.paint(box, tube, patient.hu["bowel"] + 6 * c.soft[box], _LABEL["stomach"])
    paint_gut(c, patient, box, tube + 3 * (1.2 - fill) + 1, (drunk, float(rng.uniform(8, 42)), gas))


def paint_pancreas(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """The gland, then the splenic and portal vein behind it."""
    course = course_of(rng, _PANCREAS, 5)
    box, behind = c.tube(course * (1, 1, 1, 1.7) + (0, 21, 0, 0))
    c.paint(box, np.where(c.label[box] == _LABEL["stomach"], behind, np.float32(9)), -100.0, 0)  # no stomach behind it
    box, tube = c.tube(course)
    paint_lobules(c, patient, box, np.maximum(tube, c.cavity[box] + 3), _LABEL["pancreas"])
    splenic = course[len(course) // 3 :] * (1, 1, 1, 0) + (1, 13, 0, 4.2)
    trunk = np.array([splenic[0], [38, -18, -24, 6], [52, -22, -44, 6]])
    mesenteric = np.array([[-90, -28, -8, 4], [-20, -20, -8, 5], splenic[0]])
    for vein in (splenic, spline(trunk), spline(mesenteric)):
        box, tube = c.tube(vein)
        tube = np.where(c.label[box] == _LABEL["stomach"], np.float32(9), tube)  # veins run around it
        c.paint(box, tube - 1, -90.0)
        c.paint(box, tube, patient.hu["portal"], 0)


def paint_liver(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Two lobes under the diaphragm with their veins, and the inferior vena cava, which is not labelled."""
    box, lobes = _liver_shape(c, rng)
    c.paint(box, lobes, patient.hu["liver"] + 4 * c.broad[box] + 4 * c.soft[box], _LABEL["liver"])
    inside = np.full(c.hu.shape, 50, np.float32)
    inside[box] = lobes + 4
    for veins, blood in ((_HEPATIC_VEINS, "vein"), (_PORTAL_VEINS, "portal")):
        for vein in veins:
            box, tube = c.tube(course_of(rng, vein, 5))
            c.paint(box, np.maximum(tube, inside[box]), patient.hu[blood])
    box, tube = c.tube(course_of(rng, _CAVA, 2))
    c.paint(box, tube - 1, -60.0)
    c.paint(box, tube, patient.hu["vein"] + 4 * c.soft[box], 0)


def _liver_shape(c: Canvas, rng: np.random.Generator) -> tuple[Box, Array]:
    """Two ellipsoids, cut below by the visceral surface, behind by spine and kidney, in front by the fissure."""
    size, left = float(rng.normal(1, 0.06)), float(rng.normal(1, 0.14))
    slope, edge = float(rng.normal(0.7, 0.08)), float(rng.normal(4, 7))
    part, right_lobe = c.ellipsoid(jitter(rng, (58, -4, -82), 4), (112 * size, 92 * size, 78 * size), (0, 0, 10))
    box = c.box(np.array([-65.0, -130, -170]), np.array([160.0, 90, 100 * left]))
    z, y, x, broad = c.z[box], c.y[box], c.x[box], c.broad[box]
    lobes = c.moved(box, part, right_lobe)
    part, left_lobe = c.ellipsoid(jitter(rng, (86, -64, -4), 4), (42 * left, 50, 82 * left), (0, -8, 0))
    lobes = smooth_min(lobes, c.moved(box, part, left_lobe), 10)
    visceral = 0.75 * (edge + slope * (np.minimum(x, 12) + 72) - 0.12 * (y + 20) - z)
    lobes = smooth_max(lobes, visceral, 14)
    spine = 0.8 * (y - 8 - 0.65 * np.maximum(-22 - x, 0))
    lobes = smooth_max(lobes, np.where(x > -70, spine, np.float32(-50)), 8)
    fissure = np.maximum(np.abs(x + 4 + 0.2 * (z - 60) + 4 * broad) - 2.5, np.maximum(y + 62, z - 84))
    lobes = np.maximum(np.maximum(lobes, c.cavity[box]), -fissure)
    part, kidney = c.ellipsoid((-6, 46, -62), (78, 42, 40))
    return box, smooth_max(lobes, -c.moved(box, part, kidney), 8) + 1.2 * broad


def paint_spleen(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """A bean against the left wall, hollow towards the stomach."""
    size = float(np.exp(rng.normal(0, 0.13)))
    z, y, x = jitter(rng, (64, 36, 104), 4)
    box, outer = c.ellipsoid((z, y, x), (61 * size, 62 * size, 43 * size), (-18, 14, 10))
    part, hilum = c.ellipsoid((z - 4, y - 22, x - 53 * size), (56, 46, 30), (-18, 0, 0))
    spleen = smooth_max(outer, -c.moved(box, part, hilum), 6)
    spleen = np.maximum(spleen, c.cavity[box] + 1) + 1.2 * c.broad[box]
    c.paint(box, spleen - 1.5, -95.0, 0)
    c.paint(box, spleen, patient.hu["spleen"] + 4 * c.soft[box] + 4 * c.broad[box], _LABEL["spleen"])


def paint_kidneys(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Cortex and medulla around a fatty sinus (background, as in BTCV), open to the front and the midline."""
    for side, organ, height in ((-1, "right_kidney", -8), (1, "left_kidney", 6)):
        size = float(rng.normal(1.02, 0.06))
        z, y, x = jitter(rng, (height, 32, side * (70 + 2 * side)), 4)
        turn = (side * 30, -side * 14, 12)
        box, outer = c.ellipsoid((z, y, x), (54 * size, 26 * size, 27 * size), turn)
        part, sinus = c.ellipsoid((z, y - 8, x - side * 13), (26 * size, 11, 15), turn)
        soft, sinus = c.soft[box], c.moved(box, part, sinus) + 2.5 * c.soft[box]
        kidney = smooth_max(np.maximum(outer, c.cavity[box] + 1), -sinus, 3) + 0.8 * c.broad[box]
        c.paint(box, np.maximum(outer - 2 - 0.15 * patient.fat_mm, c.cavity[box] - 2), -103.0, 0)
        medulla = np.clip((-kidney - 6 + 2.5 * soft) / 3, 0, 1)
        tissue = patient.hu["cortex"] + medulla * (patient.hu["medulla"] - patient.hu["cortex"]) + 5 * soft
        c.paint(box, kidney, tissue, _LABEL[organ])
        c.paint(box, np.maximum(np.abs(sinus + 7) - 2, outer + 8), 20.0)  # renal pelvis
        for shift, radius, blood in ((-4.0, 4.0, "vein"), (4.0, 2.8, "artery")):
            hilum = (z, y - 10, x - side * 18, radius)
            ends = (hilum, (4 + shift, -4, side * 24, radius), (4 + shift, -8, side * 10, radius))
            box, tube = c.tube(spline(np.array(ends)))
            c.paint(box, np.where(c.label[box] > 0, np.float32(9), tube), patient.hu[blood])


def paint_gallbladder(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """A pear in its fossa under the liver; some patients have none."""
    if not patient.has_gallbladder:
        return
    size = float(rng.uniform(0.8, 1.35))
    box, pear = c.tube(course_of(rng, [(z, y, x, r * size) for z, y, x, r in _GALLBLADDER], 4))
    pear = np.maximum(pear, c.cavity[box] + 2)
    beside = np.where(c.label[box] == _LABEL["liver"], np.float32(9), pear - 1.5)  # no fat towards the liver
    c.paint(box, beside, -95.0, 0)
    c.paint(box, pear, patient.hu["bile"] + 22, _LABEL["gallbladder"])
    c.paint(box, pear + 2, patient.hu["bile"] + 3 * c.soft[box])
