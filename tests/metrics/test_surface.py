import itertools
import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from organseg.metrics.surface import organ_boxes, surface, surface_scores

SPACING = (2.0, 1.0, 3.0)


def mask_of(voxels, shape=(3, 5, 3)):
    mask = np.zeros(shape, bool)
    mask[tuple(zip(*voxels, strict=True))] = True
    return mask


def brute_force(preds, label, spacing, tolerance):
    """METHOD.md 4 word by word, in plain Python: sets of voxels and all pairs of them."""

    def centres(mask):
        inside = {tuple(int(i) for i in voxel) for voxel in np.argwhere(mask)}
        steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
        border = [v for v in inside if any(tuple(map(sum, zip(v, step, strict=True))) not in inside for step in steps)]
        return [[i * s for i, s in zip(v, spacing, strict=True)] for v in border]

    def percentile_95(values):
        values = sorted(values)
        place = 0.95 * (len(values) - 1)
        low, high = values[math.floor(place)], values[math.ceil(place)]
        return low + (place - math.floor(place)) * (high - low)

    ours, truth = centres(preds), centres(label)
    there = [min(math.dist(a, b) for b in truth) for a in ours]
    back = [min(math.dist(a, b) for b in ours) for a in truth]
    both = there + back
    within = sum(d <= tolerance * (1 + 1e-6) for d in both) / len(both)
    return max(both), max(percentile_95(there), percentile_95(back)), sum(both) / len(both), within


@pytest.mark.parametrize(("step", "distance"), [((1, 0, 0), 2.0), ((0, 1, 0), 1.0), ((0, 0, 1), 3.0)])
def test_two_voxels_one_step_apart(step, distance):
    scores = surface_scores(mask_of([(0, 0, 0)]), mask_of([step]), SPACING, tolerance_mm=2.0)
    assert (scores.hd_mm, scores.hd95_mm, scores.asd_mm) == (distance, distance, distance)
    assert scores.nsd == (distance <= 2.0)


def test_tolerance_is_inclusive():
    two_mm_apart = mask_of([(0, 0, 0)]), mask_of([(1, 0, 0)])
    assert surface_scores(*two_mm_apart, SPACING, tolerance_mm=2.0).nsd == 1.0
    assert surface_scores(*two_mm_apart, SPACING, tolerance_mm=1.99).nsd == 0.0


def test_tolerance_bears_spacing_in_float32():
    row = np.zeros((2, 1, 1, 9), bool)
    row[0, ..., 2] = row[1, ..., 7] = True
    spacing = float(np.float32(0.4))  # 5 voxels: 2.00000003 mm
    assert surface_scores(row[0], row[1], (1.0, 1.0, spacing), tolerance_mm=2.0).nsd == 1.0


def test_one_voxel_against_a_row_worked_by_hand():
    label = mask_of([(0, y, 0) for y in range(4)])
    scores = surface_scores(mask_of([(0, 0, 0)]), label, SPACING, tolerance_mm=2.0)
    # From the voxel: 0. From the row, y step 1 mm: 0, 1, 2, 3; its 95th percentile lies at rank 0.95 * 3 = 2.85.
    assert scores.hd_mm == 3.0
    assert scores.hd95_mm == pytest.approx(2.85)
    assert scores.asd_mm == pytest.approx((0 + 0 + 1 + 2 + 3) / 5)
    assert scores.nsd == pytest.approx(4 / 5)


def test_scores_do_not_depend_on_which_map_is_which():
    ours, truth = mask_of([(0, 0, 0), (2, 4, 2)]), mask_of([(0, y, 1) for y in range(4)])
    assert surface_scores(ours, truth, SPACING) == surface_scores(truth, ours, SPACING)


def test_surface_leaves_out_what_has_all_face_neighbours_inside():
    cube = np.zeros((5, 5, 5), bool)
    cube[1:4, 1:4, 1:4] = True
    expected = cube.copy()
    expected[2, 2, 2] = False
    assert (surface(cube) == expected).all()


def test_beyond_the_image_is_outside():
    expected = np.ones((3, 3, 3), bool)
    expected[1, 1, 1] = False
    assert (surface(np.ones((3, 3, 3), bool)) == expected).all()
    assert surface(np.ones((1, 3, 3), bool)).all()


MASKS = array_shapes(min_dims=3, max_dims=3, max_side=5).flatmap(
    lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape))
)
BLOCK = np.ones((4, 4, 4), bool)


@settings(deadline=None, max_examples=150)
@example((BLOCK, np.pad(BLOCK[:3, :2], ((1, 0), (2, 0), (0, 0)))), (2.0, 1.0, 3.0), 2.0)
@given(MASKS, st.tuples(*[st.floats(0.3, 5.0)] * 3), st.floats(0.0, 6.0))
def test_scores_are_those_of_all_pairs(masks, spacing, tolerance):
    preds, label = masks
    assume(preds.any() and label.any())
    hd, hd95, asd, nsd = brute_force(preds, label, spacing, tolerance)
    scores = surface_scores(preds, label, spacing, tolerance)
    assert scores.hd_mm == pytest.approx(hd, rel=1e-9)
    assert scores.hd95_mm == pytest.approx(hd95, rel=1e-9)
    assert scores.asd_mm == pytest.approx(asd, rel=1e-9)
    assert scores.nsd == pytest.approx(nsd, rel=1e-9)


def test_scores_of_surfaces_with_more_voxels_than_a_leaf():
    generator = np.random.default_rng(0)
    preds, label = generator.random((2, 7, 8, 9)) < 0.4
    hd, hd95, asd, nsd = brute_force(preds, label, (2.5, 0.7, 1.1), 1.0)
    scores = surface_scores(preds, label, (2.5, 0.7, 1.1), 1.0)
    found = scores.hd_mm, scores.hd95_mm, scores.asd_mm, scores.nsd
    assert found == pytest.approx((hd, hd95, asd, nsd), rel=1e-9)


def test_room_around_the_masks_changes_nothing():
    generator = np.random.default_rng(1)
    preds, label = generator.random((2, 4, 5, 6)) < 0.5
    wide = [np.pad(mask, ((1, 2), (3, 0), (0, 4))) for mask in (preds, label)]
    assert astuple(surface_scores(*wide, SPACING)) == pytest.approx(astuple(surface_scores(preds, label, SPACING)))


def test_boxes_hold_each_organ_of_both_maps():
    preds, label = np.zeros((2, 4, 5, 6), np.uint8)
    preds[0, 1, 2] = 1
    label[3, 1, 1] = 1
    label[2:4, 2:5, 3] = 2
    label[0, 0, 0] = 255
    boxes = organ_boxes(preds, label, 3)
    assert boxes[0] == (slice(0, 4), slice(1, 2), slice(1, 3))
    assert boxes[1] == (slice(2, 4), slice(2, 5), slice(3, 4))
    assert label[boxes[2]].size == 0


VOXEL = np.ones((1, 1, 1), bool)


@pytest.mark.parametrize(
    ("preds", "label", "spacing", "message"),
    [
        (VOXEL, ~VOXEL, SPACING, "must not be empty"),
        (~VOXEL, VOXEL, SPACING, "must not be empty"),
        (VOXEL, np.ones((1, 1, 2), bool), SPACING, r"one shape, got \(1, 1, 1\) and \(1, 1, 2\)"),
        *[
            (VOXEL, VOXEL, spacing, r"`spacing` must be 3 positive numbers \(z, y, x\) in mm, got")
            for spacing in [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, math.nan, 1.0), (1.0, math.inf, 1.0)]
        ],
    ],
)
def test_what_has_no_distance_is_refused(preds, label, spacing, message):
    with pytest.raises(ValueError, match=message):
        surface_scores(preds, label, spacing)


def test_every_axis_has_its_own_spacing():
    ends = [mask_of([corner], (2, 2, 2)) for corner in itertools.product((0, 1), repeat=3)]
    distances = [surface_scores(ends[0], end, SPACING).hd_mm for end in ends]
    assert distances == pytest.approx([0, 3, 1, 10**0.5, 2, 13**0.5, 5**0.5, 14**0.5])
