"""The body around the organs of `phantom.py`: wall, chest, bones, bowel and vessels, all background in the label map.

Positions are (z, y, x) mm in the reference body: z = 0 at the kidneys, y = 0 at the aorta, x = 0 at the spine.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from organseg.data.phantom_patient import Patient
from organseg.data.phantom_shapes import WHOLE, Array, Box, Canvas, course_of, jitter, smooth_max, smooth_min, spline

# Courses of (z, y, x, radius); those of muscles are for the left side.
_BACK_MUSCLE = ((-260, 62, 36, 22), (0, 62, 36, 22), (260, 60, 28, 17))
_PSOAS = ((-240, 2, 62, 21), (-120, 12, 48, 21), (-40, 20, 38, 16), (40, 26, 26, 7))
_QUADRATUS = ((-140, 50, 70, 16), (-60, 50, 66, 16), (20, 48, 58, 10))
_ILIAC_WING = ((62, 34), (50, 62), (22, 92), (-8, 112), (-30, 118))  # (y, x)
_ARTERIES = (
    ((-115, -8, 6, 8), (-60, -4, 10, 9), (0, -2, 11, 10), (80, 1, 10, 11), (150, 14, 16, 12), (260, 16, 20, 12)),
    ((-112, -8, 6, 7), (-150, -6, 32, 6), (-230, -20, 62, 6)),
    ((-112, -8, 6, 7), (-150, -6, -20, 6), (-230, -20, -50, 6)),
    ((45, -6, 10, 4), (20, -24, 10, 4), (-80, -30, 6, 3)),
)
_DUODENUM = (
    (28, -58, -28, 12), (20, -38, -50, 13), (-22, -8, -52, 13), (-42, -2, -28, 12), (-36, -14, 12, 11),
    (-8, -32, 42, 11),
)  # fmt: skip
_OESOPHAGUS = ((88, 0, 22, 9), (105, -2, 16, 9), (150, 0, 10, 9), (260, 2, 4, 9))
# Nests of bowel loops (z, y, x, how many): beside the organs too, where they are taken for pancreas or stomach.
_NESTS = (
    (-60, -55, -25, 9), (-85, -50, 30, 9), (-120, -40, 0, 8), (-25, -60, 48, 7), (-55, -40, 78, 6), (10, -55, 70, 4),
    (-60, -30, -85, 5), (45, -75, 40, 1), (5, -70, -50, 2), (-160, -40, 0, 8),
)  # fmt: skip


def paint_torso(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Skin, fat, muscle wall, the fatty cavity, diaphragm, lungs, heart; sets the abdominal cavity of the canvas."""
    depth, width = patient.cavity_mm
    waist = 1 - float(rng.uniform(0, 0.05)) * np.exp(-(((c.z + 45) / 60) ** 2))
    y, x = (c.y - (66 - depth)) / depth, c.x / (width * waist)
    # between an ellipse and a rectangle; sqrt, since a power of float32 is slow
    squared_y, squared_x = y * y, x * x
    ratio = np.sqrt(np.sqrt(squared_x * squared_x + squared_y * squared_y + 1.2 * squared_x * squared_y))
    c.wall = np.sqrt(squared_y * depth**2 + squared_x * width**2) * (1 - 1 / np.maximum(ratio, 0.05))
    side, back = np.abs(c.x), np.clip(c.y / 60, 0, 1)
    flank, rectus = np.clip((side - 75) / 45, 0, 1), np.exp(-(((side - 36) / 24) ** 2))
    muscle = c.wall - patient.wall_mm * (0.35 + 0.65 * np.maximum(np.maximum(flank, rectus), back)) - 7 * back
    skin = muscle - patient.fat_mm * (0.75 + 0.0015 * side + 0.35 * back - 0.002 * np.clip(c.z, -100, 150)) - 2
    hu = patient.hu["muscle"]
    bed = (66 + patient.wall_mm + 7 + 1.2 * patient.fat_mm) * patient.scale[1] + float(rng.uniform(4, 14))
    for drop, bend in ((0.0, 1500.0), (28.0, 700.0)):  # a CT table is a hollow shell, its edges turned up
        c.paint(WHOLE, np.abs(c.up + bed + drop - np.square(c.across) / bend) - 2.2, 450.0)
    c.paint(WHOLE, skin, 35.0)
    c.paint(WHOLE, skin + 2.5, -104 + 5 * c.broad)
    c.paint(WHOLE, muscle, hu + 5 * c.soft + 6 * c.broad)
    sheet = np.abs(c.wall - 0.5 * patient.wall_mm + 1.5 * c.broad) - 0.4
    c.paint(WHOLE, np.maximum(sheet, 70 - side), -20.0)  # fat between the flat muscles
    c.paint(WHOLE, c.wall, -106 + 5 * c.broad + 4 * c.soft)
    dome = _diaphragm(c, rng)
    c.cavity = np.maximum(c.wall + 1.5, dome + 2.5)
    _paint_chest(c, patient, rng, dome)


def _paint_chest(c: Canvas, patient: Patient, rng: np.random.Generator, dome: Array) -> None:
    """What the top slices show above the diaphragm."""
    c.paint(WHOLE, np.maximum(c.wall, np.abs(dome) - 1.6), patient.hu["muscle"])
    lung = smooth_max(c.wall + 1.5, 1.5 - dome, 4)
    c.paint(WHOLE, lung, -840 + 25 * c.broad + 30 * c.soft)
    c.paint(WHOLE, np.maximum(lung + 4, 2.1 - np.abs(c.soft - 0.2 * c.broad)), -120.0)  # lung vessels
    box, spine = c.ellipsoid((170, 25, 0), (130, 52, 40))
    c.paint(box, np.maximum(spine, -dome[box]), -100.0)
    box, heart = c.ellipsoid(jitter(rng, (162, -48, 26), 5), (44, 44, 60), (0, 0, 20))
    heart = np.maximum(heart, 2 - dome[box])
    c.paint(box, heart - 5, -95.0)
    c.paint(box, heart, patient.hu["vein"] + 8 * c.broad[box])


def _diaphragm(c: Canvas, rng: np.random.Generator) -> Array:
    """Distance to the space under the diaphragm: domes right, left and under the heart; recesses at the wall."""
    right, left = 132 + float(rng.normal(0, 6)), 118 + float(rng.normal(0, 6))
    front = np.square(c.y + 18) * np.where(c.y < -18, 0.6, 1).astype(np.float32)
    right_slope = np.power((np.square(c.x + 66) + front) / 94**2, 1.3)
    left_slope = np.power((np.square(c.x - 78) + np.square(c.y + 8)) / 84**2, 1.3)
    domes = smooth_max(right - 95 * right_slope, left - 95 * left_slope, 12)
    heart_bed = np.power(np.square((c.x - 4) / 78) + np.square((c.y + 58) / 66), 1.3)
    domes = smooth_max(domes, 104 + float(rng.normal(0, 4)) - 80 * heart_bed, 12)
    recess = 34 + 42 * np.clip(-(c.y + 20) / 85, 0, 1) * np.exp(-np.square(c.x / 75)) + 4 * c.broad
    return np.asarray(0.75 * (c.z - np.maximum(recess, domes)), dtype=np.float32)


def paint_skeleton(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Ribs, back muscles, psoas, vertebrae, iliac bones."""
    for side in (-1, 1):
        for muscle in (_BACK_MUSCLE, _PSOAS, _QUADRATUS):
            box, tube = c.tube(course_of(rng, [(z, y, side * x, r) for z, y, x, r in muscle], 2))
            c.paint(box, tube, patient.hu["muscle"] - 4 + 7 * c.soft[box] + 6 * c.broad[box])
    _paint_ribs(c, rng)
    _paint_spine(c, rng)
    for side in (-1, 1):
        box = c.box(np.array([-400.0, -45, side * 80 - 60]), np.array([-80.0, 75, side * 80 + 60]))
        z, y, x = c.z[box], c.y[box], side * c.x[box] - 0.12 * (c.z[box] + 150)
        wing = _distance_to_line(y, x, _ILIAC_WING) - 4.5
        crest = z + 92 + 0.008 * (y - 15) ** 2
        wing = smooth_max(wing, crest, 4)
        c.paint(box, wing, np.where(wing < -2, 300, 560).astype(np.float32))


def _distance_to_line(y: Array, x: Array, nodes: tuple[tuple[float, float], ...]) -> Array:
    """Distance to a line through (y, x) nodes, the same at every height."""
    distance = np.full_like(y, 1e3)
    for (y0, x0), (y1, x1) in pairwise(nodes):
        length = (y1 - y0) ** 2 + (x1 - x0) ** 2
        part = np.clip(((y - y0) * (y1 - y0) + (x - x0) * (x1 - x0)) / length, 0, 1)
        gap = (y - y0 - part * (y1 - y0)) ** 2 + (x - x0 - part * (x1 - x0)) ** 2
        np.minimum(distance, np.sqrt(gap), out=distance)
    return distance


def _paint_ribs(c: Canvas, rng: np.random.Generator) -> None:
    """Ribs run in the wall, down and forward from the spine, as far as the costal margin; cartilage in front."""
    pitch = 30 + float(rng.normal(0, 1.5))
    turn = (c.z + 0.32 * np.abs(c.x) - 0.5 * c.y + float(rng.uniform(0, 30))) / pitch
    across = (turn - np.rint(turn)) * pitch * 0.85
    rib = (np.sqrt(((c.wall - 5) / 4.2) ** 2 + (across / 6.5) ** 2) - 1) * 4.2
    margin = np.maximum(-8 + 0.8 * np.clip(-c.y - 20, -40, 200) - c.z, 16 - np.abs(c.x))
    rib = np.maximum(rib, margin)
    bone = np.where(rib < -2, 260, 520)
    c.paint(WHOLE, rib, np.where(c.y < -70, 120, bone).astype(np.float32))


def _paint_spine(c: Canvas, rng: np.random.Generator) -> None:
    """Vertebral bodies and discs, canal, arches, transverse and spinous processes."""
    box = c.box(np.array([-400.0, -10, -50]), np.array([400.0, 90, 50]))
    z, y, x = c.z[box], c.y[box] - 22, c.x[box]
    pitch = 36 + float(rng.normal(0, 1.5))
    turn = z / pitch + float(rng.uniform(0, 1))
    level = (turn - np.rint(turn)) * pitch
    body = (np.sqrt((x / 23) ** 2 + (y / 17) ** 2) - 1) * 18
    disc = np.abs(np.abs(level) - pitch / 2) - 4.5
    spongy, cortex = 190 + 35 * c.soft[box], 520.0
    arch = np.abs((np.sqrt((x / 16) ** 2 + ((y - 25) / 13) ** 2) - 1) * 13) - 3.2
    lamina = np.maximum(arch, np.abs(level) - 12)
    process = np.maximum(np.abs(x) - 3.4, np.maximum(np.abs(y - 44) - 13, np.abs(level + 8) - 10))
    wings = np.maximum(np.abs(y - 22 - 0.15 * np.abs(x)) - 3.4, np.maximum(np.abs(x) - 40, np.abs(level) - 6))
    bone = smooth_min(smooth_min(lamina, process, 3), wings, 3)
    c.paint(box, bone, np.where(bone < -2, 330.0, cortex).astype(np.float32))
    c.paint(box, body, np.where(body < -2.2, spongy, cortex * 0.75).astype(np.float32))
    c.paint(box, np.maximum(body, disc), 85.0)
    c.paint(box, (np.sqrt((x / 11) ** 2 + ((y - 26) / 8.5) ** 2) - 1) * 9, 28.0)


Filling = tuple[str, float, float]
"""What a gut holds (fluid, stool or contrast), the HU of its fluid, and the share of gas."""


def paint_gut(c: Canvas, patient: Patient, box: Box, tube: Array, filling: Filling) -> None:
    """A hollow organ: wall, contents, and gas above the fluid's level."""
    content, fluid_hu, gas = filling
    soft, inner = c.soft[box], tube + 2.6
    c.paint(box, tube, patient.hu["bowel"] + 5 * soft)
    if content == "stool":
        c.paint(box, inner, 20 + 45 * soft - 500 * (soft > 1.2).astype(np.float32))
    elif content == "contrast":
        c.paint(box, inner, 260 + 25 * c.broad[box])
    else:
        c.paint(box, inner, fluid_hu + 9 * soft + 6 * c.broad[box])
    lumen = inner < 0
    if gas > 0 and lumen.any():
        up = np.broadcast_to(c.up[:, box[1]], inner.shape)
        c.paint(box, np.maximum(inner, float(np.quantile(up[lumen], 1 - gas)) - up), -930.0)


def paint_lobules(c: Canvas, patient: Patient, box: Box, distance: Array, label: int = 0) -> None:
    """The pancreas's tissue: lobules with fat between them. Collapsed jejunum gets exactly the same."""
    soft = c.soft[box]
    distance = distance + 1.9 * soft
    c.paint(box, distance - 2, -100.0, 0)
    c.paint(box, distance, patient.hu["pancreas"] - 14 * np.maximum(soft - 0.4, 0) + 5 * c.broad[box], label)


def paint_colon(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Ascending, transverse (more or less sagging) and descending colon, with stool, gas or contrast."""
    front, side = 92 - 2 * patient.cavity_mm[0], patient.cavity_mm[1] - 26
    sag, size = float(rng.uniform(-45, 5)), float(rng.uniform(0.8, 1.15))
    courses = (
        ((-190, 5, 25 - side, 20), (-120, -5, 6 - side, 26), (-60, 0, 3 - side, 24), (-8, -12, 8 - side, 22)),
        ((-8, -12, 8 - side, 20), (0, front + 30, -75, 20), (sag, front, -30, 19), (sag, front, 30, 19),
         (25, front + 25, 80, 19), (52, -10, side - 8, 18)),
        ((52, -10, side - 6, 17), (20, 22, side, 16), (-60, 16, side, 15), (-130, 5, side - 10, 15),
         (-190, 5, side - 40, 14)),
    )  # fmt: skip
    for course in courses:
        content = "contrast" if patient.positive_contrast and rng.random() < 0.6 else "stool"
        filling = (content, 0.0, float(rng.uniform(0.1, 0.75)))
        box, tube = c.tube(course_of(rng, [(z, y, x, r * size) for z, y, x, r in course], 5))
        haustra = 2.2 * np.cos(c.z[box] / 5.5 + c.x[box] / 7) + 1.5 * c.broad[box]
        paint_gut(c, patient, box, np.maximum(tube + haustra, c.cavity[box] + 1), filling)


def _loops(patient: Patient, rng: np.random.Generator) -> Iterator[tuple[NDArray[np.float64], Filling | None]]:
    """Courses of small-bowel loops with what they hold, None for collapsed ones; most lie below the organs."""
    for z, y, x, count in _NESTS:
        for _ in range(count):
            nodes = [rng.normal((z, y, x), (16, 18, 20))]
            heading = rng.normal(0, 1, 3)
            for _ in range(int(rng.integers(3, 6))):
                heading = 0.55 * heading + rng.normal(0, 1, 3)
                nodes.append(nodes[-1] + 21 * heading / np.sqrt((heading**2).sum()))
            collapsed = rng.random() < 0.5
            radius = rng.uniform(8.5, 12.5) if collapsed else rng.uniform(10, 17)
            content = "contrast" if patient.positive_contrast and rng.random() < 0.5 else "fluid"
            gas = float(rng.uniform(0.15, 0.6)) if rng.random() < 0.4 else 0.0
            course = spline(np.column_stack([nodes, np.full(len(nodes), radius)]), 3)
            yield course, None if collapsed else (content, float(rng.uniform(8, 42)), gas)


def paint_small_bowel(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Loops, collapsed (the pancreas's look) or with fluid and gas (the stomach's), and the mesentery's vessels."""
    for _ in range(34):
        root, target = rng.normal((-5, -22, 2), 6), rng.normal((-55, -55, 10), (40, 18, 45))
        bend = (root + target) / 2 + rng.normal(0, 12, 3)
        box, tube = c.tube(spline(np.column_stack([[root, bend, target], [3.4, 2.6, 1.8]])))
        c.paint(box, tube, patient.hu["vein"])
    for course, filling in _loops(patient, rng):
        box, tube = c.tube(course)
        before_spine = c.y[box] + 16 - 0.4 * np.abs(c.x[box])
        outside = np.maximum(c.cavity[box] + 3, before_spine)
        if filling is None:
            paint_lobules(c, patient, box, np.maximum(tube, outside))
        else:
            tube = np.maximum(tube + 1.2 * c.soft[box], outside)
            c.paint(box, tube - 2, -102.0)
            paint_gut(c, patient, box, tube, filling)


def paint_vessels(c: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Crura, aorta and its branches, duodenum, oesophagus; the inferior vena cava comes with the liver."""
    for side in (-1, 1):
        crus = ((-30, 8, 4 + 10 * side, 4), (40, -2, 3 + 14 * side, 6), (95, -14, 6 + 20 * side, 6))
        box, tube = c.tube(course_of(rng, crus, 1))
        c.paint(box, np.maximum(tube, c.cavity[box]), patient.hu["muscle"])
    for course in _ARTERIES:
        box, tube = c.tube(course_of(rng, course, 2))
        c.paint(box, tube - 1.5, -90.0)
        c.paint(box, tube, patient.hu["artery"])
    box, tube = c.tube(course_of(rng, _DUODENUM, 4))
    tube = np.maximum(tube + 1.4 * c.soft[box], c.cavity[box])
    c.paint(box, tube - 2, -100.0)
    paint_gut(c, patient, box, tube, ("fluid", float(rng.uniform(8, 42)), 0.12))
    box, tube = c.tube(course_of(rng, _OESOPHAGUS, 2))
    c.paint(box, tube, patient.hu["bowel"])
