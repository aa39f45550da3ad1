import itertools

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from organseg.volumes import (
    WorkingGrid,
    affine_on,
    canonical_affine,
    resample_label,
    resampled_affine,
    spacing_of,
    spacing_on,
    to_canonical,
    to_file,
)

SCAN, SPACING = (40, 512, 400), (5.0, 0.75, 0.8)


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        (WorkingGrid(), (40, 512, 400)),
        (WorkingGrid(size=128), (40, 128, 128)),
        (WorkingGrid(spacing=(5.0, 1.5, 1.6)), (40, 256, 200)),
        (WorkingGrid(spacing=(2.0, 0.75, 1.0)), (100, 512, 320)),
        (WorkingGrid(spacing=(3.0, 2.0, 3.0)), (67, 192, 107)),  # 66.7, 192, 106.7
        (WorkingGrid(spacing=(1000.0, 1.5, 1000.0)), (1, 256, 1)),
    ],
)
def test_shapes_by_hand(grid, shape):
    assert grid.shape(SCAN, SPACING) == shape


@pytest.mark.parametrize("new_shape", [(40, 128, 128), (67, 192, 107), (1, 1, 1), (80, 1024, 800)])
def test_the_extent_stays(new_shape):
    spacing = spacing_on(new_shape, SCAN, SPACING)
    assert np.multiply(spacing, new_shape) == pytest.approx(np.multiply(SPACING, SCAN))
    # The same rule as the affine's.
    affine = resampled_affine(np.diag([*SPACING, 1]), SCAN, new_shape)
    assert np.diag(affine)[:3] == pytest.approx(spacing)


def test_a_grid_is_reached_within_half_a_voxel():
    wanted = (3.0, 2.0, 3.0)
    shape = WorkingGrid(spacing=wanted).shape(SCAN, SPACING)
    found = spacing_on(shape, SCAN, SPACING)
    assert all(abs(f - w) * n <= w / 2 + 1e-9 for f, w, n in zip(found, wanted, shape, strict=True))


ORIENTATIONS = [
    (axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)
]


def affine_of(axes, flips, angles=(0, 0, 0)) -> np.ndarray:
    """File axis i runs along world axis axes[i], in the direction flips[i], then all is turned."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for file_axis, (world_axis, flip) in enumerate(zip(axes, flips, strict=True)):
        affine[world_axis, file_axis] = flip * (0.8, 1.1, 2.5)[world_axis]
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = (11, -23, 37)
    return affine


def test_affine_by_hand():
    # LAS, 4 columns and rows of 1 mm become 2 of 2 mm: the first centre moves by half a millimetre along each axis.
    affine = np.diag([-1.0, 1.0, 3.0, 1.0])
    assert affine_on((5, 2, 2), (5, 4, 4), affine).tolist() == [
        [-2, 0, 0, -0.5],
        [0, 2, 0, 0.5],
        [0, 0, 3, 0],
        [0, 0, 0, 1],
    ]
    assert (affine_on((5, 4, 4), (5, 4, 4), affine) == affine).all()


@settings(max_examples=100)
@given(
    how=st.sampled_from(ORIENTATIONS),
    angles=st.tuples(*[st.floats(-40, 40)] * 3),
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    new=st.tuples(*[st.integers(1, 40)] * 3),
)
def test_the_affine_of_the_file_and_that_of_the_array_are_one(how, angles, shape, new):
    affine = affine_of(*how, angles)
    found = affine_on(new, shape, affine)
    expected = resampled_affine(canonical_affine(shape, affine), shape, new)
    assert np.abs(canonical_affine(new, found) - expected).max() < 1e-9
    assert spacing_of(found) == pytest.approx(spacing_on(new, shape, spacing_of(affine)))
    assert nibabel.aff2axcodes(found) == nibabel.aff2axcodes(affine)


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_an_object_stays_at_its_place_in_the_world(axes, flips):
    affine = affine_of(axes, flips, (10, 5, -8))
    label = np.zeros((20, 40, 24), np.uint8)  # in file order, an object off the middle
    label[3:9, 5:17, 12:20] = 1
    canonical = to_canonical(label, affine)
    new = (canonical.shape[0] // 2, 2 * canonical.shape[1], canonical.shape[2] // 4)
    moved, on = to_file(resample_label(canonical, new), affine), affine_on(new, canonical.shape, affine)
    places = [nibabel.affines.apply_affine(a, np.argwhere(m)).mean(0) for m, a in ((label, affine), (moved, on))]
    assert np.linalg.norm(places[0] - places[1]) < 0.6 * max(spacing_of(on))
