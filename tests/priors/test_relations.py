"""Where an organ is that was not found: what the other organs of the case say."""

import numpy as np
import pytest

from organseg.priors import completed, relations

NOWHERE = [np.nan] * 3
ALL = np.ones(3, dtype=bool)


def centres(*organs) -> np.ndarray:
    return np.array(organs, dtype=np.float32)


CASES = (
    centres([0, 0, 0], [10, 20, 30], NOWHERE),
    centres([5, 5, 5], [17, 25, 35], [5, 5, 45]),
    centres([1, 1, 1], [12, 21, 231], [1, 1, 51]),
    centres(NOWHERE, NOWHERE, [7, 7, 7]),
)


def test_relations_are_medians_over_the_cases_that_have_both():
    between = relations(CASES)
    np.testing.assert_allclose(between[1, 0], [11, 20, 30])  # of 10 12 11, of 20 20 20, of 30 30 230
    np.testing.assert_allclose(between[0, 1], [-11, -20, -30])
    np.testing.assert_allclose(between[2, 0], [0, 0, 45])  # of two cases: their mean
    np.testing.assert_allclose(between[[0, 1, 2], [0, 1, 2]], 0)


def test_an_organ_is_put_where_the_others_say_and_found_ones_stay():
    case = centres([100, 100, 100], [111, 120, 140], NOWHERE)
    given = case.copy()
    between = relations(CASES)
    result = completed(case, between, ALL)
    np.testing.assert_array_equal(case, given)
    np.testing.assert_array_equal(result[:2], case[:2])
    np.testing.assert_allclose(result[2], np.median([case[0] + between[2, 0], case[1] + between[2, 1]], axis=0))
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(completed(case, between, np.array([True, True, False])), case)


def test_one_organ_found_amiss_does_not_decide():
    between = np.zeros((4, 4, 3), dtype=np.float32)
    case = centres(NOWHERE, [10, 10, 10], [12, 12, 12], [300, 300, 300])
    np.testing.assert_allclose(completed(case, between, np.ones(4, dtype=bool))[0], 12)


@pytest.mark.parametrize("case", [centres(NOWHERE, NOWHERE, NOWHERE), centres(NOWHERE, NOWHERE, [1, 2, 3])])
def test_where_nobody_can_say_it_stays_unknown(case):
    never_together = relations([centres([0, 0, 0], [1, 1, 1], NOWHERE), centres(NOWHERE, NOWHERE, [3, 3, 3])])
    assert np.isnan(never_together[2, 0]).all() and np.isnan(never_together[0, 2]).all()
    np.testing.assert_array_equal(completed(case, never_together, ALL), case)


def test_the_type_is_that_of_centres():
    assert relations(CASES).dtype == completed(CASES[0], relations(CASES), ALL).dtype == np.float32
