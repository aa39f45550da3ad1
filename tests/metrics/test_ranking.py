"""Against counting pairs, and by hand."""

import numpy as np
import pytest

from organseg.metrics.ranking import ranking


def test_by_hand():
    found = ranking(np.array([0.9, 0.8, 0.7, 0.6], np.float32), np.array([True, False, True, False]))
    assert found.auc == pytest.approx(3 / 4)
    assert found.ap_success == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert found.ap_error == pytest.approx((1 / 1 + 2 / 3) / 2)  # from below: wrong, right, wrong, right


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs_and_ties_half(seed):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 6, 60).astype(np.float32) / 8
    correct = rng.random(60) < 0.4
    won = [(a > b) + 0.5 * (a == b) for a in score[correct] for b in score[~correct]]
    assert ranking(score, correct).auc == pytest.approx(np.mean(won))


def test_scores_that_differ_in_the_last_bit_are_no_ties():
    score = np.array([1.0, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    assert ranking(score, np.array([True, False])).auc == 1
    assert ranking(score, np.array([False, True])).auc == 0
    assert ranking(score, np.array([True, False])).ap_error == 1


@pytest.mark.parametrize("correct", [[], [True, True], [False]])
def test_nothing_to_rank(correct):
    found = ranking(np.full(len(correct), 0.5, np.float32), np.array(correct, bool))
    assert np.isnan([found.auc, found.ap_success, found.ap_error]).all()
