"""Paired statistics against the formula and against scipy's one-sample test of the differences."""

import numpy as np
import pytest
from scipy import stats

from optiscope.examples.experiments.paired import mean_interval, paired


@pytest.mark.parametrize("n", [2, 5, 9])
def test_paired_is_the_one_sample_test_of_the_differences(n):
    treated, baseline = np.random.default_rng(n).normal(1.5, 0.1, (2, n))
    difference = treated - baseline
    found, test = paired(treated, baseline), stats.ttest_1samp(difference, 0)
    half = stats.t.ppf(0.975, n - 1) * np.sqrt(difference.var(ddof=1) / n)
    assert (found.n, found.below) == (n, sum(d < 0 for d in difference.tolist()))
    assert (found.mean, found.p) == (pytest.approx(difference.mean()), pytest.approx(test.pvalue))
    assert (found.low, found.high) == (pytest.approx(difference.mean() - half), pytest.approx(difference.mean() + half))


def test_a_single_pair_has_no_interval():
    found = paired([1.0], [3.0])
    assert (found.n, found.mean, found.below) == (1, -2.0, 1)
    assert np.isnan([found.low, found.high, found.p]).all()


def test_equal_differences_are_a_point():
    assert paired([1.0, 2.0], [1.0, 2.0]) == paired([3.0, 3.0], [3.0, 3.0])
    found = paired([1.0, 2.0], [0.5, 1.5])
    assert (found.low, found.mean, found.high, found.p) == (0.5, 0.5, 0.5, 0.0)


def test_the_mean_interval_is_scipys():
    values = np.random.default_rng(0).normal(size=6)
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    assert mean_interval(values) == (pytest.approx(interval.low), pytest.approx(values.mean()), pytest.approx(interval.high))
    assert np.isnan(mean_interval([2.0])[0])


def test_the_interval_covers_what_it_says():
    """2,000 draws of five normal differences: a 95 % interval holds their mean in 1,900 ± 4·√(2000·0.95·0.05) of them."""
    draws = np.random.default_rng(1).normal(0.3, 1.0, (2000, 5))
    covered = sum((found := paired(draw, np.zeros(5))).low <= 0.3 <= found.high for draw in draws)
    assert abs(covered - 1900) < 4 * np.sqrt(2000 * 0.95 * 0.05)
