"""METHOD.md 1.5: exactly ceil(gamma n - 1e-9) of the candidates, the highest scores, ties by index."""

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from organseg.curriculum import select_confident


def test_by_hand():
    score = np.array([[0.9, 0.5, 0.7], [0.7, 0.7, 0.1]])
    candidates = np.array([[False, True, True], [True, True, True]])
    chosen = select_confident(score, candidates, 0.4)  # 2 of 5: the first two of three equal scores
    assert chosen.tolist() == [[False, False, True], [True, False, False]]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40), st.floats(0, 1))
def test_count_order_and_ties(entries, gamma):
    score = np.array([value / 4 for value, _ in entries])
    candidates = np.array([candidate for _, candidate in entries], dtype=bool)
    chosen = select_confident(score, candidates, gamma)
    assert chosen.sum() == max(0, ceil(gamma * candidates.sum() - 1e-9))
    assert not (chosen & ~candidates).any()
    ranked = sorted(np.flatnonzero(candidates), key=lambda i: (-score[i], i))
    assert set(np.flatnonzero(chosen)) == set(ranked[: int(chosen.sum())])


def test_a_third_of_three_is_one():
    # 1/3 * 3 is 1.0000000000000002 in some orders of computation; it must not become 2.
    assert select_confident(np.arange(3.0), np.ones(3, bool), 0.1 + 0.2 + 1 / 30).sum() == 1


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_gamma_is_a_share(gamma):
    with pytest.raises(ValueError, match="gamma"):
        select_confident(np.ones(3), np.ones(3, bool), gamma)


def test_a_score_that_is_none_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        select_confident(np.array([0.1, np.nan]), np.array([True, True]), 0.5)
    assert select_confident(np.array([0.1, np.nan]), np.array([True, False]), 1).tolist() == [True, False]
