import math

import numpy as np
import pytest

from organseg.metrics.statistics import (
    bootstrap_interval,
    compare_paired,
    holm,
    paired_differences,
    paired_t_test,
    wilcoxon,
)

NAN = math.nan


def test_holm_worked_by_hand():
    # Sorted: .005 * 4 = .02, .01 * 3 = .03, .03 * 2 = .06, .04 * 1 = .04, raised to its predecessor's .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_one_and_skips_tests_not_made():
    assert holm([0.6, NAN, 0.5]) == pytest.approx([1.0, NAN, 1.0], nan_ok=True)
    assert holm([0.3, NAN, 0.01]) == pytest.approx([0.3, NAN, 0.02], nan_ok=True)
    assert holm([0.04]) == pytest.approx([0.04])
    assert holm([]).size == 0


def test_holm_leaves_its_input_alone():
    given = np.array([0.01, 0.02])
    holm(given)
    assert given.tolist() == [0.01, 0.02]


def test_paired_t_test_worked_by_hand():
    # Mean 2, standard deviation 1: t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    assert paired_t_test(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - math.sqrt(12) / math.sqrt(14))


def test_wilcoxon_worked_by_hand():
    assert wilcoxon(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2 / 2**5)
    # Negative ranks sum to 5; 10 of the 32 sign patterns have 5 or less on one side.
    assert wilcoxon(np.array([1.0, 2.0, 3.0, 4.0, -5.0])) == pytest.approx(2 * 10 / 32)
    assert wilcoxon(np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2 / 2**5)


def test_equal_differences_have_their_limits_and_no_warning():
    assert (paired_t_test(np.zeros(4)), wilcoxon(np.zeros(4)), bootstrap_interval(np.zeros(4))) == (
        1.0,
        1.0,
        (0.0, 0.0),
    )
    assert paired_t_test(np.full(4, 0.5)) == 0.0
    assert bootstrap_interval(np.full(4, 0.5)) == (0.5, 0.5)


@pytest.mark.parametrize("differences", [np.array([]), np.array([0.3])])
def test_too_few_pairs_say_nothing(differences):
    assert math.isnan(paired_t_test(differences))
    assert all(math.isnan(end) for end in bootstrap_interval(differences))
    assert math.isnan(wilcoxon(np.array([])))


def test_bootstrap_interval_of_many_normal_differences_is_the_normal_one():
    differences = np.random.default_rng(3).normal(1.0, 2.0, 400)
    error = differences.std(ddof=1) / 20
    low, high = bootstrap_interval(differences)
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.15 * error)
    narrow = bootstrap_interval(differences, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(differences) == (low, high)
    assert bootstrap_interval(differences, seed=1) != (low, high)


def test_comparison_leaves_out_pairs_without_a_value():
    first = [0.9, NAN, 0.8, 0.7, 0.9]
    second = [0.8, 0.5, 0.6, NAN, 0.6]
    compared = compare_paired(first, second)
    differences = np.subtract([0.9, 0.8, 0.9], [0.8, 0.6, 0.6])
    assert compared.cases == 3
    assert compared.mean_difference == pytest.approx(0.2)
    assert compared.t_test_p == paired_t_test(differences)
    assert compared.wilcoxon_p == wilcoxon(differences)
    assert (compared.low, compared.high) == bootstrap_interval(differences)


def test_comparison_of_nothing_is_nan():
    compared = compare_paired([NAN], [1.0])
    assert compared.cases == 0
    assert math.isnan(compared.mean_difference)


def test_values_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match=r"one value a case, got \(2,\) and \(3,\)"):
        paired_differences([1.0, 2.0], [1.0, 2.0, 3.0])
