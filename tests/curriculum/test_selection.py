"""METHOD.md 1.5: exactly ceil(gamma n - 1e-9) of the candidates, the highest scores, ties by index."""

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from organseg.curriculum import Selection, select_confident
from organseg.curriculum.selection import choose
from organseg.errors import UsageError


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


SPACING = (5.0, 2.0, 2.0)


def chosen(mask, score, gamma=1.0, mean_ml=np.nan, **options):
    """`choose` on volumes; returns the mask of what was chosen and the scores, NaN where there is no candidate."""
    index = np.flatnonzero(mask)
    flat = score.ravel()[index].astype(np.float32)
    picked, ranked, likewise = choose(index, flat, flat, mask.shape, SPACING, gamma, Selection(**options), mean_ml)
    assert (ranked == likewise).all(), "of equal values"
    result, scores = np.zeros(mask.size, bool), np.full(mask.size, np.nan, np.float32)
    result[index], scores[index] = picked, ranked
    return result.reshape(mask.shape), scores.reshape(mask.shape)


def two_pieces():
    """A large piece of low probability and a small one of high probability, which do not even share a corner."""
    mask, score = np.zeros((4, 9, 9), bool), np.full((4, 9, 9), 0.6)
    mask[0:2, 0:4, 0:4] = True  # 32 voxels, sum 19.2
    mask[3, 6:9, 6:9] = True  # 9 voxels, sum 8.1
    score[3] = 0.9
    return mask, score


def test_by_default_it_is_the_share_with_the_highest_scores():
    rng = np.random.default_rng(3)
    mask, score = rng.random((3, 5, 6)) < 0.5, rng.random((3, 5, 6)).astype(np.float32)
    result, scores = chosen(mask, score, 0.4)
    assert (result == select_confident(score, mask, 0.4)).all()
    assert (scores[mask] == score[mask]).all()


def test_the_largest_piece_by_probability():
    mask, score = two_pieces()
    assert (chosen(mask, score)[0] == mask).all()
    result, _ = chosen(mask, score, largest_piece=True)
    assert result[:2].sum() == 32 and not result[3].any()
    assert chosen(mask, score, 0.5, largest_piece=True)[0].sum() == 16  # half of that piece, not of all
    score[3] = 0.999999
    mask[3, 5:9, 3:9] = True
    assert chosen(mask, score, largest_piece=True)[0][3].sum() == 24  # 24 x 1.0 outweigh 32 x 0.6


def test_pieces_that_share_a_corner_are_one():
    mask = np.zeros((2, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[0, 3, 3] = True
    result, _ = chosen(mask, np.ones(mask.shape), largest_piece=True)
    assert result[0, 0, 0] and result[1, 1, 1] and not result[0, 3, 3]


def test_smoothing_prefers_the_middle_over_a_lonely_voxel():
    mask, score = np.zeros((5, 12, 12), bool), np.full((5, 12, 12), 0.7)
    mask[1:4, 1:6, 1:6] = True
    mask[0, 11, 11], score[0, 11, 11] = True, 0.99
    assert chosen(mask, score, 0.01)[0][0, 11, 11]
    result, scores = chosen(mask, score, 0.01, smooth_mm=4.0)
    assert result.sum() == 1 and result[2, 3, 3]
    # In mm: a step of 5 mm along z loses more than one of 2 mm along y.
    assert scores[2, 3, 3] > scores[2, 2, 3] > scores[1, 3, 3]


def test_the_probability_is_averaged_as_the_score_is():
    rng = np.random.default_rng(2)
    index = np.flatnonzero(rng.random((3, 6, 6)) < 0.6)
    one, other = rng.random((2, len(index))).astype(np.float32)
    options = ((3, 6, 6), SPACING, 1.0, Selection(smooth_mm=3.0))
    (_, first, second), (_, third, fourth) = choose(index, one, other, *options), choose(index, other, one, *options)
    assert (first == fourth).all() and (second == third).all() and not (first == second).any()


def test_smoothing_does_not_depend_on_where_the_organ_lies():
    rng = np.random.default_rng(1)
    small, values = rng.random((3, 5, 5)) < 0.7, rng.random((3, 5, 5))
    small[0, 0, 0] = small[-1, -1, -1] = True
    found = []
    for z, y, x in ((0, 0, 0), (2, 7, 3)):
        mask, score = np.zeros((6, 14, 14), bool), np.zeros((6, 14, 14))
        place = (slice(z, z + 3), slice(y, y + 5), slice(x, x + 5))
        mask[place], score[place] = small, values
        found.append(chosen(mask, score, smooth_mm=3.0)[1][place])
    np.testing.assert_array_equal(found[0], found[1])


def test_no_more_than_the_mean_volume():
    mask, score = two_pieces()  # 41 voxels of 20 mm3: 0.82 mL
    assert chosen(mask, score, 1.0, 0.41, max_volume=1.0)[0].sum() == 21  # rounded up, as shares are
    assert chosen(mask, score, 0.5, 0.41, max_volume=1.0)[0].sum() == 11
    assert chosen(mask, score, 1.0, 0.41, max_volume=3.0)[0].sum() == 41
    assert chosen(mask, score, 1.0, np.nan, max_volume=1.0)[0].sum() == 41


def test_without_candidates_nothing_is_chosen():
    empty = np.zeros((2, 3, 3), bool)
    assert not chosen(empty, np.ones((2, 3, 3)), smooth_mm=2.0, largest_piece=True, max_volume=1.0)[0].any()


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"threshold": 1.0}, {"smooth_mm": -1.0}, {"smooth_mm": np.nan}, {"max_volume": 0.0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Selection(**options)
