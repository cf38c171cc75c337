"""Rank-1 second moments against the joint distribution written out, and what is known of it."""

from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.quantities.factored import rank1, sums


def naive(v):
    """MI by its definition, and the errors, entry by entry."""
    v = np.asarray(v, dtype=np.float64)
    p, errors, information = v / v.sum(), [], 0.0
    for i in range(v.shape[0]):
        for j in range(v.shape[1]):
            if v[i, j] > 0:
                quotient = p[i, j] / (p[i].sum() * p[:, j].sum())
                information += p[i, j] * log(quotient)
                errors.append(log(quotient) / log(10))
    return information, np.sqrt(np.mean(np.square(errors))), np.max(np.abs(errors))


def log_normal(rows, cols, seed=0, spread=2.0):
    return np.exp(spread * np.random.default_rng(seed).standard_normal((rows, cols)) - 15)


@pytest.mark.parametrize("zeros", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(17, 29), (3, 5), (1, 8), (300, 400)])
def test_against_the_definition(shape, zeros):
    v = log_normal(*shape)
    v[np.random.default_rng(1).random(shape) < zeros] = 0
    found = rank1(v)
    # Largest difference measured: 2.5e-14, of float64 sums in another order.
    assert (found.information, found.log_error, found.log_error_max) == pytest.approx(naive(v), abs=1e-12)
    assert rank1(v.astype(np.float32)).information == pytest.approx(naive(v.astype(np.float32))[0], abs=1e-12)


def test_the_identity_loses_two_log_two():
    """I-divergence at the optimum = S·MI, here with S = 2."""
    v = np.eye(2)
    expected = np.full((2, 2), 0.5)
    divergence = sum(v[i, i] * log(v[i, i] / expected[i, i]) for i in range(2)) - v.sum() + expected.sum()
    assert divergence == pytest.approx(2 * log(2))
    assert v.sum() * rank1(v).information == pytest.approx(2 * log(2), abs=1e-15)


def test_the_divergence_is_the_sum_times_the_information_and_the_smallest_of_rank_one():
    v, generator = log_normal(12, 7, spread=1.0), np.random.default_rng(3)
    rows, columns = sums(v)

    def divergence(estimate):
        return (v * np.log(v / estimate) - v + estimate).sum()

    best = np.outer(rows, columns) / v.sum()
    assert v.sum() * rank1(v).information == pytest.approx(divergence(best), rel=1e-12)
    for _ in range(50):
        other = np.outer(rows * np.exp(0.1 * generator.standard_normal(12)), columns * np.exp(0.1 * generator.standard_normal(7))) / v.sum()
        assert divergence(other) > divergence(best)


@given(seed=st.integers(0, 1000), rows=st.integers(1, 9), cols=st.integers(1, 9))
def test_rank_one_loses_nothing_and_nothing_loses_more_than_the_log_of_the_short_side(seed, rows, cols):
    generator = np.random.default_rng(seed)
    flat = np.outer(np.exp(3 * generator.standard_normal(rows)), np.exp(3 * generator.standard_normal(cols)))
    found = rank1(flat)
    assert found.information < 1e-13
    assert found.log_error_max < 1e-13
    any_v = np.exp(5 * generator.standard_normal((rows, cols)))
    assert 0 <= rank1(any_v).information <= log(min(rows, cols)) + 1e-12


def test_a_permutation_matrix_loses_all_there_is():
    assert rank1(np.eye(16)[np.random.default_rng(0).permutation(16)]).information == pytest.approx(log(16))


def test_scale_does_not_count():
    v = log_normal(9, 11)
    scaled = rank1(1e20 * v)
    assert (scaled.information, scaled.log_error) == pytest.approx((rank1(v).information, rank1(v).log_error), rel=1e-12)


@pytest.mark.parametrize("v", [np.zeros((3, 4)), np.full((3, 4), np.nan), np.array([[1.0, np.inf]])])
def test_nothing_is_said_of_zero_or_what_is_not_finite(v):
    assert np.isnan([rank1(v).information, rank1(v).log_error, rank1(v).log_error_max]).all()


def test_averages_of_the_margins_are_the_margins_of_the_average():
    """Adafactor keeps R and C each for itself; with the same weights, corrected once, they are V's row and column sums."""
    generator, beta = np.random.default_rng(5), 0.99
    v, r, c = np.zeros((6, 4)), np.zeros(6), np.zeros(4)
    for _ in range(20):
        square = np.square(generator.standard_normal((6, 4)))
        v, r, c = beta * v + (1 - beta) * square, beta * r + (1 - beta) * square.sum(1), beta * c + (1 - beta) * square.sum(0)
    rows, columns = sums(v / (1 - beta**20))
    np.testing.assert_allclose(np.outer(rows, columns) / rows.sum(), np.outer(r, c) / r.sum() / (1 - beta**20), rtol=1e-13)
