"""Is one method better than another on the same cases? Paired tests, intervals, Holm's correction (METHOD.md 4).

All take the two methods' values case by case. A pair with a NaN, an organ that the case does not annotate, is left out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


@dataclass(frozen=True)
class PairedComparison:
    """What two methods' paired values say; NaN where there are too few pairs.

    Attributes:
        cases: Pairs compared.
        mean_difference: Mean of first - second, in the metric's unit.
        low: Lower end of the bootstrap interval of the mean difference.
        high: Upper end.
        t_test_p: Two-sided p of the paired t-test.
        wilcoxon_p: Two-sided p of the Wilcoxon signed-rank test.
    """

    cases: int
    mean_difference: float
    low: float
    high: float
    t_test_p: float
    wilcoxon_p: float


def compare_paired(
    first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> PairedComparison:
    """Run all paired statistics on two methods' values.

    Args:
        first: float [N], one value a case.
        second: float [N], the other method's, in the same order of cases.
        confidence: Level of the interval.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The comparison.

    Raises:
        ValueError: If the shapes differ.
    """
    differences = paired_differences(first, second)
    low, high = bootstrap_interval(differences, confidence=confidence, resamples=resamples, seed=seed)
    mean = float(differences.mean()) if differences.size else float("nan")
    return PairedComparison(differences.size, mean, low, high, paired_t_test(differences), wilcoxon(differences))


def paired_differences(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """First - second, for the pairs in which both have a value.

    Args:
        first: float [N].
        second: float [N].

    Returns:
        float64 [n], n <= N.

    Raises:
        ValueError: If the shapes differ: values that cannot be paired.
    """
    ours, theirs = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape:
        msg = f"`first` and `second` must be [N], one value a case, got {ours.shape} and {theirs.shape}"
        raise ValueError(msg)
    differences = ours - theirs
    return differences[~np.isnan(differences)]


def paired_t_test(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the mean difference being 0, by the paired t-test.

    Args:
        differences: float64 [n].

    Returns:
        p; NaN below two pairs. Where all differences are equal: 1 if they are 0, else 0.
    """
    if differences.size < 2:
        return float("nan")
    if np.ptp(differences) == 0:  # no variance: the limits, without scipy's NaN and warnings
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def wilcoxon(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the differences being symmetric about 0, by Wilcoxon's signed ranks; zero differences are dropped.

    Args:
        differences: float64 [n].

    Returns:
        p, exact for up to 50 pairs without ties; NaN without pairs, 1 where all differences are 0.
    """
    if differences.size == 0:
        return float("nan")
    moved = differences[differences != 0]
    return float(stats.wilcoxon(moved).pvalue) if moved.size else 1.0


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down correction of several tests' p (Holm 1979): controls the chance of any false discovery.

    The i-th smallest of m is multiplied by m - i + 1, then nothing may be smaller than its predecessor, or above 1.

    Args:
        p_values: float [m]; NaN is a test that was not made, and does not count in m.

    Returns:
        Corrected p, float64 [m], in the order given; NaN stays NaN.
    """
    corrected = np.array(p_values, np.float64)
    made = np.flatnonzero(~np.isnan(corrected))
    order = made[np.argsort(corrected[made], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(corrected[order] * factors), 1.0)
    return corrected


def bootstrap_interval(
    differences: NDArray[np.float64], *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean difference by resampling the cases, bias-corrected and accelerated (Efron 1987).

    Args:
        differences: float64 [n].
        confidence: Level.
        resamples: Resamples.
        seed: Seed: the same differences give the same interval.

    Returns:
        (low, high); NaN below two pairs. Where all differences are equal both are that value.
    """
    if differences.size < 2:
        return float("nan"), float("nan")
    if np.ptp(differences) == 0:  # BCa is undefined without variance
        return float(differences[0]), float(differences[0])
    interval = stats.bootstrap(
        (differences,), np.mean, confidence_level=confidence, n_resamples=resamples, rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(interval.low), float(interval.high)
