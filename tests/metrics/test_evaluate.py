import math
from dataclasses import astuple

import numpy as np
import pytest

from organseg.metrics.evaluate import UNKNOWN, OrganScore, diagonal_mm, evaluate_case
from organseg.metrics.surface import surface_scores

SPACING = (2.0, 1.0, 3.0)
NAN = math.nan
ABSENT, PRESENT = False, True


def one_organ(preds_present, label_present, annotated=True):
    preds, label = np.zeros((2, 3, 4, 5), np.uint8)
    preds[1, 1, 1:3] = preds_present
    label[1, 1, 2:4] = label_present
    return evaluate_case(preds, label, [annotated], SPACING)[0]


@pytest.mark.parametrize(
    ("preds_present", "label_present", "expected"),
    [
        # Voxels of 6 mm3. Found: 1 common voxel of 2 and 2; the outer ones are 3 mm from the other mask.
        (PRESENT, PRESENT, OrganScore("found", 0.5, 3.0, 2.85, 1.5, 0.5, 0.012, 0.012)),
        (ABSENT, ABSENT, OrganScore("both_empty", 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)),
        (ABSENT, PRESENT, OrganScore("missed", 0.0, NAN, NAN, NAN, 0.0, 0.0, 0.012)),
        (PRESENT, ABSENT, OrganScore("false_positive", 0.0, NAN, NAN, NAN, 0.0, 0.012, 0.0)),
    ],
)
def test_each_way_to_be_empty(preds_present, label_present, expected):
    score = one_organ(preds_present, label_present)
    assert score.outcome == expected.outcome
    assert astuple(score)[1:] == pytest.approx(astuple(expected)[1:], nan_ok=True)


@pytest.mark.parametrize("preds_present", [ABSENT, PRESENT])
def test_an_organ_that_is_not_annotated_has_no_value_whatever_was_predicted(preds_present):
    score = one_organ(preds_present, ABSENT, annotated=False)
    assert score is UNKNOWN
    assert score.outcome == "unknown"
    assert all(math.isnan(value) for value in astuple(score)[1:])


def random_case(seed=0):
    generator = np.random.default_rng(seed)
    preds = generator.choice(np.arange(4, dtype=np.uint8), (6, 7, 8), p=[0.7, 0.1, 0.1, 0.1])
    label = generator.choice(np.array([0, 1, 2, 3, 255], np.uint8), (6, 7, 8), p=[0.5, 0.1, 0.1, 0.1, 0.2])
    return preds, label


def test_each_organ_is_scored_on_its_own_voxels_without_the_ignored_ones():
    preds, label = random_case()
    scores = evaluate_case(preds, label, np.array([True, False, True]), SPACING, tolerance_mm=1.0)
    assert [score.outcome for score in scores] == ["found", "unknown", "found"]
    for k in (1, 3):
        ours, truth = (preds == k) & (label != 255), label == k
        expected = surface_scores(ours, truth, SPACING, 1.0)
        score = scores[k - 1]
        found = score.hd_mm, score.hd95_mm, score.asd_mm, score.nsd
        assert found == pytest.approx(astuple(expected))
        assert score.dsc == pytest.approx(2 * (ours & truth).sum() / (ours.sum() + truth.sum()))
        assert score.preds_volume_ml == pytest.approx(ours.sum() * 0.006)
        assert score.label_volume_ml == pytest.approx(truth.sum() * 0.006)


def test_predictions_at_ignored_voxels_do_not_matter():
    preds, label = random_case()
    other = np.where(label == 255, 1, preds)
    assert (other != preds).any()
    assert evaluate_case(other, label, [True] * 3, SPACING) == evaluate_case(preds, label, [True] * 3, SPACING)


def test_an_organ_predicted_only_where_the_truth_is_ignored_is_rightly_absent():
    preds, label = np.zeros((2, 2, 2, 2), np.uint8)
    preds[0, 0, 0], label[0, 0, 0] = 1, 255
    assert evaluate_case(preds, label, [True], SPACING)[0].outcome == "both_empty"


def test_default_tolerance_is_two_millimetres():
    preds, label = np.zeros((2, 3, 4, 5), np.uint8)
    preds[0, 0, 0] = label[1, 0, 0] = 1  # 2 mm apart
    preds[0, 3, 0] = label[0, 3, 1] = 2  # 3 mm apart
    assert [score.nsd for score in evaluate_case(preds, label, [True, True], SPACING)] == [1.0, 0.0]


def test_diagonal_is_that_of_the_whole_image():
    assert diagonal_mm((3, 2, 4), (1.0, 2.0, 3.0)) == pytest.approx(13.0)  # 3, 4 and 12 mm


def test_a_wrong_spacing_is_refused_even_where_no_distance_is_measured():
    nothing = np.zeros((2, 2, 2), np.uint8)
    with pytest.raises(ValueError, match="3 positive numbers"):
        evaluate_case(nothing, nothing, [True], (1.0, 1.0))


def test_a_label_beyond_the_organs_is_refused():
    label = np.full((1, 1, 1), 2, np.uint8)
    with pytest.raises(ValueError, match=r"`label` must hold 0..1 or 255, found \[2\]"):
        evaluate_case(np.zeros_like(label), label, [True], SPACING)
