"""Error bars: against scipy's bootstrap, against closed forms, and by how often they hold the truth."""

import warnings

import numpy as np
import pytest
from scipy.stats import bootstrap, t

from optiscope.diagnostics.bootstrap import LEVEL, RESAMPLES, interval, layer_interval, resampled, resamples
from optiscope.diagnostics.nan_quantile import nan_quantile

RNG = np.random.default_rng(7)


def test_one_matrix_a_layer_is_scipys_percentile_bootstrap():
    values = RNG.standard_normal(12)
    scipys = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", vectorized=True, rng=np.random.default_rng(0))
    expected = scipys.confidence_interval.low, scipys.confidence_interval.high
    # The same draws, summed in another order.
    np.testing.assert_allclose(layer_interval(lambda i: values[i].mean(), np.arange(12)), expected, rtol=1e-12)
    np.testing.assert_allclose(interval(np.mean(resampled(values, np.arange(12)), axis=-1)), expected, rtol=1e-12)


def test_whole_layers_are_drawn():
    """Against a cluster bootstrap written as a loop over scipy's own draws of layers."""
    layers = np.array([2, 0, 0, 1, 5, 5, 5, 2])
    values = RNG.standard_normal(8)
    members = [np.flatnonzero(layers == layer) for layer in np.unique(layers)]

    def mean_of(drawn):
        return values[np.concatenate([members[i] for i in drawn.astype(int)])].mean()

    scipys = bootstrap((np.arange(4),), mean_of, n_resamples=RESAMPLES, method="percentile", vectorized=False, rng=np.random.default_rng(0))
    expected = scipys.confidence_interval.low, scipys.confidence_interval.high
    np.testing.assert_allclose(layer_interval(lambda i: values[i].mean(), layers), expected, rtol=1e-12)
    np.testing.assert_allclose(interval(np.nanmean(resampled(values, layers), axis=-1)), expected, rtol=1e-12)


def test_a_resample_holds_as_many_layers_as_there_are_each_whole():
    layers = np.array([0, 1, 1, 3, 3, 3])
    for chosen in resamples(layers):
        chosen = chosen[chosen >= 0]
        counts = np.bincount(chosen, minlength=6)
        assert counts[1] == counts[2]
        assert counts[3] == counts[4] == counts[5]
        assert counts[[0, 1, 3]].sum() == 3


def test_matrices_without_a_layer_stand_alone():
    values = RNG.standard_normal(6)
    assert layer_interval(lambda i: values[i].sum(), [-1] * 6) == layer_interval(lambda i: values[i].sum(), range(6, 0, -1))


def test_the_spread_of_a_mean_over_layers():
    """Var of the bootstrap mean of L layers of equal size is Σ(x_l − x̄)²/L², x_l the layers' means."""
    layers, values = np.repeat(np.arange(20), 3), RNG.standard_normal(60)
    means = values.reshape(20, 3).mean(axis=1)
    drawn = np.mean(resampled(values, layers), axis=-1)
    # Relative standard error of a variance from 999 draws is √(2/999) = 4.5 %; 4 of them.
    assert drawn.var() == pytest.approx(means.var() / 20, rel=0.18)


def test_coverage_of_a_mean_of_layers_that_hang_together():
    """Of 400 data sets of 30 layers × 4 matrices with a common part per layer; the interval over matrices alone misses most."""
    rng, hits, naive = np.random.default_rng(3), 0, 0
    layers = np.repeat(np.arange(30), 4)
    for _ in range(400):
        values = np.repeat(rng.standard_normal(30), 4) + 0.3 * rng.standard_normal(120)
        for label, count in ((layers, "whole"), (np.arange(120), "apart")):
            low, high = interval(np.nanmean(resampled(values, label), axis=-1))
            hit = low <= 0 <= high
            hits, naive = (hits + hit, naive) if count == "whole" else (hits, naive + hit)
    # 95 % nominal, about 93 % for 30 layers; binomial standard deviation 1.3 %.
    assert 0.88 < hits / 400 < 0.98
    assert naive / 400 < 0.80


@pytest.mark.parametrize("layers", [[], [0], [0, 0, 1, 1]])
def test_too_few_layers_have_no_interval(layers):
    values = np.arange(len(layers), dtype=float)
    assert np.isnan(layer_interval(lambda i: values[i].mean(), layers)).all()
    assert np.isnan(interval(nan_quantile(resampled(np.stack([values, values]), layers)))).all()


def test_resamples_without_a_value_are_left_out():
    values = np.array([np.nan, np.nan, 1.0, 2.0, 3.0])
    low, high = layer_interval(lambda i: np.nanmean(values[i]), range(5))
    assert 1.0 <= low < 2.0 < high <= 3.0
    # Of five layers with a single value 1 − 0.8⁵ = 67 % of resamples have it; of one in twenty 64 %; none where there is none.
    assert layer_interval(lambda i: np.nanmean(np.array([1.0, *[np.nan] * 4])[i]), range(5)) == (1.0, 1.0)
    assert np.isnan(layer_interval(lambda i: np.nan, range(5))).all()


def test_other_seeds_are_other_draws():
    values = RNG.standard_normal(10)
    first, second = (np.mean(resampled(values, range(10), seed), axis=-1) for seed in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(RESAMPLES)


def test_nan_quantile_is_numpys():
    values = RNG.standard_normal((3, 40, 12))
    values[RNG.random(values.shape) < 0.4] = np.nan
    values[0, 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a row without a value
        for q in (0, 0.05, 0.5, (1 + LEVEL) / 2, 1):
            np.testing.assert_allclose(nan_quantile(values, q), np.nanquantile(values, q, axis=-1), rtol=1e-13)
    assert nan_quantile(np.empty((2, 0))).tolist() == pytest.approx([np.nan, np.nan], nan_ok=True)


def test_a_students_interval_is_near_for_many_layers():
    """A closed form: for 200 normal values the percentile interval is Student's within the noise of 999 draws."""
    values = np.random.default_rng(5).standard_normal(200)
    half = t.ppf(0.975, 199) * values.std(ddof=1) / np.sqrt(200)
    low, high = interval(np.mean(resampled(values, range(200)), axis=-1))
    # The standard error of a 2.5 % quantile of 999 draws is 0.085 standard deviations of the mean: 4 of them, 0.17 of half.
    assert low == pytest.approx(values.mean() - half, abs=0.17 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.17 * half)
