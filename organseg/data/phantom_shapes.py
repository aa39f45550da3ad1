"""Shapes, noise and a canvas for the synthetic abdomen of `phantom.py`.

A structure is a signed distance in mm (negative inside), evaluated only in the box that holds it and painted over what
was there before, with edges one voxel wide: that is partial volume. Everything is elementwise float32 (no BLAS on
voxels), so that the same seed gives the same bytes with any number of threads.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.floating[Any]]
Box = tuple[slice, slice, slice]
WHOLE: Box = (slice(None), slice(None), slice(None))
BOX_MARGIN_MM = 12.0  # by how much the deformation field may move a structure out of its box


def value_noise(rng: np.random.Generator, shape: tuple[int, int, int], cells: tuple[int, int, int]) -> Array:
    """Smooth noise [Z, Y, X] of unit variance at its nodes: `cells` random cells an axis, blended by a smoothstep."""
    noise = rng.standard_normal([count + 1 for count in cells], dtype=np.float32)
    for axis, (size, count) in enumerate(zip(shape, cells, strict=True)):
        position = np.linspace(0, count, size, dtype=np.float32)
        node = np.minimum(position.astype(np.intp), count - 1)
        part = position - node
        weight = (part * part * (3 - 2 * part)).reshape([-1 if other == axis else 1 for other in range(3)])
        noise = np.take(noise, node, axis) * (1 - weight) + np.take(noise, node + 1, axis) * weight
    return noise


def grain(rng: np.random.Generator, shape: tuple[int, int, int], sigma: float) -> Array:
    """White noise [Z, Y, X], correlated by a Gaussian of `sigma` voxels, of unit variance."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap", truncate=3)
    return np.asarray(noise / noise.std())


def smooth_min(first: Array, second: Array, radius_mm: float) -> Array:
    """The union of two distances, its crease rounded over `radius_mm`."""
    blend = np.clip(0.5 + (second - first) / (2 * radius_mm), 0, 1)
    return second + (first - second) * blend - radius_mm * blend * (1 - blend)


def smooth_max(first: Array, second: Array, radius_mm: float) -> Array:
    """The intersection of two distances, its crease rounded over `radius_mm`."""
    return -smooth_min(-first, -second, radius_mm)


def rotation(degrees: tuple[float, float, float]) -> NDArray[np.float64]:
    """The 3 x 3 rotation of (z, y, x) vectors about the z, y and x axes, in this order."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def spline(points: NDArray[np.float64], steps: int = 4) -> NDArray[np.float64]:
    """A Catmull-Rom curve through `points` [N, D] (any columns: z, y, x, radius), `steps` pieces between two points."""
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    part = np.arange(steps)[:, None] / steps
    pieces = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        cubic = 2 * b + (c - a) * part + (2 * a - 5 * b + 4 * c - d) * part**2 + (3 * (b - c) + d - a) * part**3
        pieces.append(cubic / 2)
    return np.concatenate([*pieces, points[-1:]])


def jitter(rng: np.random.Generator, point: tuple[float, float, float], mm: float) -> tuple[float, float, float]:
    """A (z, y, x) point moved by a normal step of `mm` along each axis."""
    z, y, x = (value + float(rng.normal(0, mm)) for value in point)
    return z, y, x


def course_of(
    rng: np.random.Generator, points: Iterable[tuple[float, float, float, float]], mm: float
) -> NDArray[np.float64]:
    """A smooth course through (z, y, x, radius) points: all shifted together, and each a little on its own."""
    nodes = np.array(list(points), dtype=np.float64)
    nodes[:, :3] += rng.normal(0, mm, 3) + rng.normal(0, mm / 2, (len(nodes), 3))
    nodes[:, 3] *= rng.normal(1, 0.07) * rng.normal(1, 0.04, len(nodes))
    return spline(nodes)


@dataclass
class Canvas:
    """The picture in the making, and where each of its voxels lies in the patient's body.

    Attributes:
        z: Position of each voxel in the reference body [Z, Y, X], mm, to superior; deformed, so the body is organic.
        y: The same to posterior.
        x: The same to the left.
        up: Height of each voxel above the table [1, Y, 1], mm: gas rises along it, whatever the patient's pose.
        across: Distance of each voxel from the scanner's middle, to the left [1, 1, X], mm.
        corners: Inverse of the patient's pose: (3 x 3, 3), reference mm -> voxel index (z, y, x).
        edge_mm: Width of a blurred edge.
        soft: Noise of unit variance a few voxels wide [Z, Y, X]: lobules and textures are cut from it.
        broad: The same several centimetres wide.
        hu: Image [Z, Y, X].
        label: Organ integers [Z, Y, X], 0 = background.
        wall: Distance to the trunk's inner wall [Z, Y, X], chest and abdomen.
        cavity: Distance to the abdominal cavity [Z, Y, X]: under the diaphragm, within the wall; organs stay inside.
    """

    z: Array
    y: Array
    x: Array
    up: Array
    across: Array
    corners: tuple[NDArray[np.float64], NDArray[np.float64]]
    edge_mm: float
    soft: Array
    broad: Array
    hu: Array = field(init=False)
    label: NDArray[np.uint8] = field(init=False)
    wall: Array = field(init=False)
    cavity: Array = field(init=False)

    def __post_init__(self) -> None:
        self.hu = np.full(self.z.shape, -1000, np.float32)
        self.label = np.zeros(self.z.shape, np.uint8)
        self.wall = np.full(self.z.shape, -1000, np.float32)
        self.cavity = np.full(self.z.shape, -1000, np.float32)

    def box(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> Box:
        """The index box that holds all of [low, high] (z, y, x in reference mm), however the body is posed."""
        choices = np.array([[low, high][bit] for bit in (0, 1)])
        ends = np.array([[choices[i, 0], choices[j, 1], choices[k, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
        ends = np.clip(ends, -1e4, 1e4)
        grown = ends + np.sign(ends - ends.mean(0)) * BOX_MARGIN_MM
        matrix, offset = self.corners
        index = (matrix[None] * grown[:, None, :]).sum(-1) + offset
        start = np.maximum(np.floor(index.min(0)), 0).astype(int)
        stop = np.minimum(np.ceil(index.max(0)) + 1, self.hu.shape).astype(int)
        z, y, x = (slice(a, max(a, b)) for a, b in zip(start.tolist(), stop.tolist(), strict=True))
        return z, y, x

    def moved(self, wanted: Box, box: Box, distance: Array) -> Array:
        """A distance that is known in `box`, in the box `wanted`: far outside where it was not computed."""
        whole = np.full(self.hu.shape, 60, np.float32)
        whole[box] = distance
        return whole[wanted]

    def paint(self, box: Box, distance: Array, hu: Array | float, label: int | None = None) -> None:
        """Cover the inside of `distance` with `hu`; `label` None leaves the label map as it is."""
        cover = np.clip(0.5 - distance / self.edge_mm, 0, 1)
        image = self.hu[box]
        image += cover * (hu - image)
        if label is not None:
            self.label[box][distance < 0] = label

    def ellipsoid(
        self,
        centre: tuple[float, float, float],
        radii: tuple[float, float, float],
        degrees: tuple[float, float, float] = (0, 0, 0),
    ) -> tuple[Box, Array]:
        """The box and the distance of a turned ellipsoid; all triples are (z, y, x)."""
        turn = rotation(degrees)
        reach = np.sqrt((turn**2 * np.square(radii)[None]).sum(1))
        box = self.box(np.array(centre) - reach, np.array(centre) + reach)
        z, y, x = self.z[box] - centre[0], self.y[box] - centre[1], self.x[box] - centre[2]
        matrix = turn.tolist()  # Python's floats keep float32 arrays float32
        first = np.zeros_like(z)
        second = np.zeros_like(z)
        for axis, radius in enumerate(radii):
            along = (z * matrix[0][axis] + y * matrix[1][axis] + x * matrix[2][axis]) / radius
            first += along * along
            second += (along / radius) ** 2
        # the first-order distance to the quadric: exact at the surface, where it matters
        size = np.sqrt(first)
        return box, size * (size - 1) / np.maximum(np.sqrt(second), 1e-6)

    def tube(self, points: NDArray[np.float64]) -> tuple[Box, Array]:
        """The box and the distance of a tube through `points` [N, 4]: z, y, x and the radius there."""
        reach = points[:, 3:]
        low, high = points[:, :3] - reach, points[:, :3] + reach
        box = self.box(low.min(0), high.max(0))
        distance = np.full(self.z[box].shape, 1e3, np.float32)
        nodes = points.tolist()
        for first in range(0, len(nodes) - 1, 3):  # a long tube fills little of its box: go piece by piece
            last = first + 4
            piece = self.box(low[first:last].min(0), high[first:last].max(0))
            z, y, x = self.z[piece], self.y[piece], self.x[piece]
            inner = tuple(
                slice(part.start - whole.start, part.stop - whole.start) for part, whole in zip(piece, box, strict=True)
            )
            for start, stop in zip(nodes[first:last], nodes[first + 1 : last], strict=False):
                nearer = _to_capsule(z - start[0], y - start[1], x - start[2], start, stop)
                np.minimum(distance[inner], nearer, out=distance[inner])
        return box, distance


def _to_capsule(z: Array, y: Array, x: Array, start: list[float], stop: list[float]) -> Array:
    """Distance to a piece of tube between two (z, y, x, radius); positions are relative to its start."""
    to_z, to_y, to_x, wider = (b - a for a, b in zip(start, stop, strict=True))
    length = max(to_z**2 + to_y**2 + to_x**2, 1e-6)
    part = np.clip((z * to_z + y * to_y + x * to_x) / length, 0, 1)
    gap = (z - part * to_z) ** 2 + (y - part * to_y) ** 2 + (x - part * to_x) ** 2
    distance: Array = np.sqrt(gap) - (start[3] + part * wider)
    return distance
