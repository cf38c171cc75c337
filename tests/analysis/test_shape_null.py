"""The shape-only null against the laws of Gaussian matrices."""

from math import log, log10, sqrt

import numpy as np
import pytest

from optiscope.analysis.shape_null import null_log10_condition, null_spectrum


# Finite size: at a short side of 128 the extremes of the spectrum are still inside the limit's. Measured 0.031, 0.018, 0.012.
@pytest.mark.parametrize(("aspect", "kappa"), [(2, 5.83), (3, 3.73), (4, 3.0)])
def test_rectangular_matrices_follow_the_closed_form(aspect, kappa):
    beta = 1 / aspect
    assert (1 + sqrt(beta)) / (1 - sqrt(beta)) == pytest.approx(kappa, abs=0.005)
    assert null_log10_condition(4096 * aspect, 4096) == pytest.approx(log10(kappa), abs=0.035)


@pytest.mark.parametrize("n", [64, 128, 1024, 4096])
def test_square_matrices_follow_edelmans_law(n):
    # P(κ/n < x) → exp(−2/x − 2/x²): the median solves x² ln 2 = 2x + 2.
    median = (1 + sqrt(1 + 2 * log(2))) / log(2)
    assert median == pytest.approx(3.67, abs=0.005)
    # log10 κ scatters by 0.5, so a median of 64 draws by 1.25·0.5/8 = 0.08. Measured 0.06.
    assert null_log10_condition(n, n) == pytest.approx(log10(median * n), abs=0.1)
    # Of log κ itself the law has mean log n + 1.537, above its median: the tail is long.
    assert null_log10_condition(n, n) < log10(np.exp(1.537) * n)


@pytest.mark.parametrize("shape", [(16, 16), (24, 32), (60, 100)])
def test_smaller_shapes_are_drawn_as_they_are(shape):
    draws = np.random.default_rng(77).standard_normal((1000, *shape))
    singular = np.linalg.svd(draws, compute_uv=False)
    sample = np.log10(singular[:, 0] / singular[:, -1])
    # Three times the error of a median of 64 draws (1.25 σ/8); of 1000 it is small beside that.
    assert null_log10_condition(*shape) == pytest.approx(np.median(sample), abs=3 * 1.25 * sample.std() / 8)


def test_beyond_128_squares_grow_with_n_and_aspects_stay():
    assert null_log10_condition(512, 512) - null_log10_condition(128, 128) == pytest.approx(log10(4), abs=1e-12)
    assert null_log10_condition(1000, 3000) == null_log10_condition(128, 384)
    assert null_log10_condition(30, 20) == null_log10_condition(20, 30)


def test_a_single_row_has_condition_one():
    assert null_log10_condition(1, 7) == null_log10_condition(7, 1) == null_log10_condition(1, 1) == 0


def test_it_is_deterministic_and_draws_nothing_from_the_global_generator():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    null_log10_condition.cache_clear()
    first = null_log10_condition(20, 30)
    null_log10_condition.cache_clear()
    assert null_log10_condition(20, 30) == first
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_the_worse_of_two_squares_is_its_own_law():
    # P(κ/n < x)² = exp(−4/x − 4/x²): the median solves x² ln 2 = 4x + 4, 6.64 against 3.67 of one.
    worse, single = (2 + 2 * sqrt(1 + log(2))) / log(2), (1 + sqrt(1 + 2 * log(2))) / log(2)
    assert worse == pytest.approx(6.64, abs=0.005)
    # As above, and the upper tail is thinner in draws: measured 0.03.
    assert null_log10_condition(128, 128, worst_of=2) - null_log10_condition(128, 128) == pytest.approx(log10(worse / single), abs=0.1)
    draws = np.random.default_rng(5).standard_normal((1000, 2, 24, 24))
    singular = np.linalg.svd(draws, compute_uv=False)
    sample = np.log10(singular[..., 0] / singular[..., -1]).max(axis=1)
    assert null_log10_condition(24, 24, worst_of=2) == pytest.approx(np.median(sample), abs=3 * 1.25 * sample.std() / 8)


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (60, 90), (48, 48)])
def test_the_spectrum_is_the_mean_one_of_gaussian_matrices(shape):
    rank = min(shape)
    singular = np.linalg.svd(np.random.default_rng(9).standard_normal((300, *shape)), compute_uv=False)
    expected = (singular / np.linalg.norm(singular, axis=1, keepdims=True)).mean(axis=0)
    found = null_spectrum(*shape)
    assert found.shape == (rank,)
    assert (np.diff(found) < 0).all()
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-12)
    # In units of the root mean square 1/√r. Measured 0.014 at the edges, where a finite matrix falls short of the law, 0.009 inside;
    # of 300 draws the mean of one value is known to 0.005.
    np.testing.assert_allclose(found * np.sqrt(rank), expected * np.sqrt(rank), atol=0.02)


@pytest.mark.parametrize("n", [64, 256])
def test_a_square_spectrum_is_that_of_the_quarter_circle(n):
    # Share of σ/√n below x is (x√(4 − x²) + 4·arcsin(x/2))/(2π): 2x/π near 0, so that the quantile 1/(2n) lies at π/(4n).
    found = null_spectrum(n, n)
    assert found[-1] * n**1.5 == pytest.approx(np.pi / 4, rel=2e-3)  # measured 2e-4
    x = found * np.sqrt(n)
    share = (x * np.sqrt(np.maximum(4 - x * x, 0)) + 4 * np.arcsin(np.minimum(x / 2, 1))) / (2 * np.pi)
    np.testing.assert_allclose(share, 1 - (np.arange(n) + 0.5) / n, atol=2e-4)
