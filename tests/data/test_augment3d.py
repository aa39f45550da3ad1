"""Patches are cut and changed in one resampling: geometry by hand, no flips, nothing invented inside the case."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from organseg.data.augment3d import PatchAugmentation, needed_box, resample


def shifted(z=0.0, y=0.0, x=0.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = z, y, x
    return matrix


def volume(shape=(7, 8, 9), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(np.float32), rng.integers(0, 4, shape).astype(np.uint8)


def test_a_shift_by_whole_voxels_is_a_crop():
    image, label = volume()
    moved, labels = resample(image, label, shifted(2, 1, 3), (4, 5, 6), -9)
    assert np.allclose(moved, image[2:6, 1:6, 3:9], atol=1e-5)
    assert (labels == label[2:6, 1:6, 3:9]).all() and labels.dtype == np.uint8


def test_outside_is_floor_and_unlabelled():
    image, label = volume()
    moved, labels = resample(image, label, shifted(-2, 0, 5), (4, 8, 9), -9)
    assert np.allclose(moved[:2], -9) and np.allclose(moved[..., 4:], -9)
    assert np.allclose(moved[2:, :, :4], image[:2, :, 5:], atol=1e-5)
    assert not labels[:2].any() and not labels[..., 4:].any()
    assert (labels[2:, :, :4] == label[:2, :, 5:]).all()


def test_a_case_of_one_slice():
    image, label = volume((1, 8, 9))
    moved, labels = resample(image, label, shifted(-1), (3, 8, 9), -9)
    assert np.allclose(moved[1], image[0], atol=1e-5) and np.allclose(moved[[0, 2]], -9)
    assert (labels[1] == label[0]).all()


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_any_change_is_scipys(seed):
    rng = np.random.default_rng(seed)
    image, label = volume((12, 14, 13), seed)
    matrix = np.eye(4)
    matrix[:3, :3] += rng.uniform(-0.3, 0.3, (3, 3))
    matrix[:3, 3] = rng.uniform(-3, 6, 3)
    moved, labels = resample(image, label, matrix, (6, 7, 5), 0)
    # scipy's "grid-constant" blends with the outside, as ours does.
    expected = affine_transform(image, matrix, output_shape=(6, 7, 5), order=1, mode="grid-constant", cval=0)
    assert np.allclose(moved, expected, atol=1e-3)
    nearest = affine_transform(label, matrix, output_shape=(6, 7, 5), order=0, mode="grid-constant", cval=0)
    assert (labels == nearest).mean() > 0.98  # but for voxels half way between two


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_box_holds_all_that_is_needed(seed):
    rng = np.random.default_rng(seed)
    image, label = volume((20, 22, 18), seed)
    matrix = np.eye(4)
    matrix[:3, :3] += rng.uniform(-0.3, 0.3, (3, 3))
    matrix[:3, 3] = rng.uniform(-8, 20, 3)
    patch = (6, 7, 5)
    box = needed_box(matrix, patch, image.shape)
    assert (box[:, 0] >= 0).all() and (box[:, 1] <= image.shape).all() and (box[:, 0] <= box[:, 1]).all()
    part = tuple(slice(*axis) for axis in box)
    inner = matrix.copy()
    inner[:3, 3] -= box[:, 0]
    whole, whole_label = resample(image, label, matrix, patch, -3)
    found, found_label = resample(image[part], label[part], inner, patch, -3)
    assert np.allclose(found, whole, atol=1e-4) and (found_label == whole_label).mean() > 0.98


def test_a_patch_beside_the_case_is_empty():
    image, label = volume()
    box = needed_box(shifted(100), (4, 4, 4), image.shape)
    part = tuple(slice(*axis) for axis in box)
    moved, labels = resample(image[part], label[part], shifted(100), (4, 4, 4), -9)
    assert (moved == -9).all() and not labels.any()


@given(st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_changes_stay_in_their_ranges_and_never_flip(seed):
    matrix = PatchAugmentation().matrix(np.random.default_rng(seed), np.array([100.0, 200, 300]))
    linear = matrix[:3, :3]
    assert 1 / 1.18 - 1e-9 <= np.cbrt(np.linalg.det(linear)) <= 1 / 0.85 + 1e-9
    # Rotations are about 11.5, 5 and 5 degrees at most: each axis stays next to itself, the same way round.
    directions = linear / np.linalg.norm(linear, axis=0)
    assert np.diag(directions).min() > np.cos(np.deg2rad(11.5 + 5 + 5))
    assert (np.abs(matrix[:3, 3]) <= 0.12 * np.array([100, 200, 300])).all()


def test_rotation_in_the_axial_plane_by_hand():
    options = PatchAugmentation(rotation_degrees=(90, 0, 0), scale=(1, 1), shift=0)

    class Most:
        def uniform(self, low, high, size=None):
            return np.full(size, high) if size else high

    turn = options.matrix(Most(), np.ones(3))
    assert np.allclose(turn @ [1, 0, 1, 1], [1, -1, 0, 1])  # z stays, x goes to -y
    assert np.allclose(turn @ [0, 1, 0, 1], [0, 0, 1, 1])


def test_intensities_are_drawn():
    image = np.ones((2, 3, 4), np.float32)
    changed = PatchAugmentation().intensities(image, np.random.default_rng(0))
    assert changed.dtype == np.float32 and np.ptp(changed) == 0 and changed[0, 0, 0] != 1
    same = PatchAugmentation(gain=(1, 1), offset=0).intensities(image, np.random.default_rng(0))
    assert (same == image).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_decides(seed):
    draw = [PatchAugmentation().matrix(np.random.default_rng(s), np.ones(3)) for s in (seed, seed, seed + 1)]
    assert np.array_equal(draw[0], draw[1]) and not np.array_equal(draw[0], draw[2])
