"""Paired differences over seeds: two trainings of one seed share initial weights and the order of the data, so each seed is its own control."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t, ttest_rel


@dataclass(frozen=True)
class Paired:
    """Mean difference over `n` seeds, its 95 % interval and p by the paired t-test, and how many of the differences are below zero."""

    n: int
    mean: float
    low: float
    high: float
    p: float
    below: int

    def told(self, spec: str = "+.4f") -> str:
        """Mean and interval, p, and the signs."""
        return f"{with_interval(self.low, self.mean, self.high, spec)}, p = {self.p:.2g}, < 0 in {self.below} of {self.n}"


def paired(treated: ArrayLike, baseline: ArrayLike) -> Paired:
    """treated − baseline, seed by seed; the interval is missing (NaN) for a single seed, and a point where all differences are equal.

    The interval holds if the differences are normal; with five seeds an effect has to be about 1.2 of their standard deviations to be told.

    >>> paired([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]).below
    1
    """
    difference = np.asarray(treated, np.float64) - np.asarray(baseline, np.float64)
    n, mean = len(difference), float(difference.mean())
    below = int((difference < 0).sum())
    if n < 2:
        return Paired(n, mean, float("nan"), float("nan"), float("nan"), below)
    if np.ptp(difference) == 0:  # t is 0/0 or infinite
        return Paired(n, mean, mean, mean, 1.0 if mean == 0 else 0.0, below)
    test = ttest_rel(treated, baseline)
    interval = test.confidence_interval()
    return Paired(n, mean, float(interval.low), float(interval.high), float(test.pvalue), below)


def with_interval(low: float, value: float, high: float, spec: str) -> str:
    """A number with its interval in brackets.

    >>> with_interval(1.0, 2.0, 3.0, ".1f")
    '2.0 [1.0, 3.0]'
    """
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Lower end, mean and upper end of a 95 % t interval over seeds."""
    x = np.asarray(values, np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return float("nan"), mean, float("nan")
    reach = float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return mean - reach, mean, mean + reach
