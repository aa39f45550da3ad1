import itertools

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from organseg.volumes import Volume, canonical_affine, canonical_shape, spacing_of, to_canonical, to_file

SHAPE = (3, 4, 5)
SPACING = (0.8, 1.1, 2.5)
LPS_TO_RAS = np.diag([-1, -1, 1])

ORIENTATIONS = [
    (axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)
]


def affine_of(axes, flips) -> np.ndarray:
    """File axis i runs along world axis axes[i], in the direction flips[i]."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for file_axis, (world_axis, flip) in enumerate(zip(axes, flips, strict=True)):
        affine[world_axis, file_axis] = flip * SPACING[file_axis]
    affine[:3, 3] = (11, -23, 37)
    return affine


def assert_same_positions(array_xyz, affine, array_zyx, index_to_mm) -> None:
    """Each voxel's value lies at the same place in the world by both descriptions."""
    indices = np.indices(array_zyx.shape).reshape(3, -1)
    z, y, x = (index_to_mm[:3, :3] @ indices) + index_to_mm[:3, 3:]
    world = LPS_TO_RAS @ np.stack([x, y, z])
    voxels = np.linalg.solve(affine[:3, :3], world - affine[:3, 3:])
    nearest = np.rint(voxels).astype(int)
    assert np.abs(voxels - nearest).max() < 1e-9
    assert (array_xyz[tuple(nearest)] == array_zyx.reshape(-1)).all()


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_every_orientation_is_voxel_exact(axes, flips):
    affine = affine_of(axes, flips)
    array = np.arange(60).reshape(SHAPE)
    canonical = to_canonical(array, affine)
    index_to_mm = canonical_affine(canonical.shape, affine)
    assert_same_positions(array, affine, canonical, index_to_mm)
    # z, y, x grow to superior, posterior, left: in LPS mm the matrix is a positive diagonal.
    assert np.allclose(index_to_mm[:3, :3], np.diag(spacing_of(affine)))
    assert np.shares_memory(canonical, array)
    assert (to_file(canonical, affine) == array).all()
    assert canonical.shape == canonical_shape(SHAPE, affine)


def test_forty_eight_orientations_are_distinct():
    array = np.arange(60).reshape(SHAPE)
    assert len({to_canonical(array, affine_of(*how)).tobytes() for how in ORIENTATIONS}) == 48


def test_las_by_hand():
    # x to left already; y to anterior: the last file row is the front one, canonical row 0.
    array = np.zeros((2, 3, 4))
    array[1, 2, 3] = 1
    affine = np.diag([-2.0, 3.0, 5.0, 1.0])
    canonical = to_canonical(array, affine)
    assert canonical.shape == (4, 3, 2)
    assert np.argwhere(canonical).tolist() == [[3, 0, 1]]
    assert spacing_of(affine) == (5, 3, 2)
    # File voxel (0, 2, 0) is world RAS (0, 6, 0), that is LPS (0, -6, 0), and canonical index (0, 0, 0).
    assert canonical_affine((4, 3, 2), affine)[:, 3].tolist() == [0, -6, 0, 1]


@settings(max_examples=60, deadline=None)
@given(
    how=st.sampled_from(ORIENTATIONS),
    angles=st.tuples(*[st.floats(-40, 40)] * 3),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
)
def test_oblique_grids_are_exact_too(how, angles, shape):
    affine = affine_of(*how)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ affine[:3, :3]
    array = np.arange(np.prod(shape)).reshape(shape)
    canonical = to_canonical(array, affine)
    assert_same_positions(array, affine, canonical, canonical_affine(canonical.shape, affine))
    assert (to_file(canonical, affine) == array).all()
    assert sorted(spacing_of(affine)) == pytest.approx(sorted(SPACING))


def test_agrees_with_nibabel():
    affine = affine_of((2, 0, 1), (1, -1, 1))
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int32).reshape(SHAPE), affine)
    ras = np.asarray(nibabel.as_closest_canonical(image).dataobj)
    assert (to_canonical(np.asarray(image.dataobj), affine) == ras[::-1, ::-1].T).all()


def test_a_volume_knows_where_its_voxels_lie():
    affine = affine_of((1, 0, 2), (1, -1, -1))
    array = np.arange(60).reshape(SHAPE)
    volume = Volume(to_canonical(array, affine), spacing_of(affine), affine)
    assert volume.shape == volume.array.shape
    assert_same_positions(array, affine, volume.array, volume.index_to_mm)
