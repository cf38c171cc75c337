"""AOL scaling: its formula entry by entry, its guarantee, and what follows from it for the predicted residuals."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiscope.diagnostics.newton_schulz.aol import aol_scaled, aol_start
from optiscope.diagnostics.newton_schulz.spectral_map import polar_residual
from optiscope.diagnostics.quantities.problem import NewtonSchulz, Problem, measure_problem

AOL = ((4.6051, -9.6552, 5.6769), (4.7505, -6.0861, 2.1790), (2.7763, -2.3190, 0.5523), (2.4231, -2.2861, 0.8193))


def gaussian(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols))


def by_entries(matrix):
    """d_i = (Σ_j |Σ_k M_ik M_jk|)^(−1/2), loops over the rows of the shorter side."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    scaled = [row / np.sqrt(sum(abs(float(row @ other)) for other in short)) for row in short]
    return np.array(scaled) if short is matrix else np.array(scaled).T


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 4), (4, 1)], ids=str)
def test_it_is_the_formula(shape):
    matrix = gaussian(*shape)
    np.testing.assert_allclose(aol_scaled(matrix), by_entries(matrix), rtol=1e-13)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99), st.floats(-6, 6), st.floats(-9, 9))
@settings(deadline=None)
def test_no_singular_value_exceeds_one_and_scale_does_not_matter(rows, cols, seed, spread, scale):
    matrix = gaussian(rows, cols, seed) * 10.0 ** (spread * np.random.default_rng(seed).random((rows, 1)))
    scaled = aol_scaled(matrix)
    assert np.linalg.norm(scaled, 2) <= 1 + 1e-12
    np.testing.assert_allclose(aol_scaled(10.0**scale * matrix), scaled, rtol=1e-10, atol=1e-14)


def test_huge_and_tiny_matrices_stay_inside_float64():
    matrix = gaussian(3, 5)
    for size in (1e200, 1e-200):
        np.testing.assert_allclose(aol_scaled(size * matrix), aol_scaled(matrix), rtol=1e-13)


def test_eps_bounds_the_row_sums_and_zero_rows_stay_zero():
    matrix = np.diag([3e-4, 1.0, 0.0])
    np.testing.assert_allclose(np.diag(aol_scaled(matrix)), [1, 1, 0], rtol=1e-14)
    # Row sums are squares: 9e-8 counts as 1e-7.
    np.testing.assert_allclose(np.diag(aol_scaled(matrix, eps=1e-7)), [3e-4 / np.sqrt(1e-7), 1, 0], rtol=1e-14)


def test_orthogonal_rows_are_not_turned():
    """There the scaling is the polar factor itself."""
    u, _, vt = np.linalg.svd(gaussian(4, 7), full_matrices=False)
    matrix = np.diag([1.0, 2.0, 3.0, 4.0]) @ vt
    np.testing.assert_allclose(aol_scaled(matrix), vt, atol=1e-14)
    start = aol_start(matrix)
    np.testing.assert_allclose(start.x, 1, rtol=1e-13)
    np.testing.assert_allclose(start.cosines, 1, rtol=1e-13)
    assert aol_start(u @ matrix).cosines.min() < 0.999  # rotated on the left, rows are orthogonal no more


def iterate(x, steps):
    for a, b, c in steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_residuals_are_predicted_from_it():
    """The curves of a problem against a naive iteration that starts from the formula."""
    matrix = np.logspace(0, 3, 24)[:, None] * gaussian(24, 40, 3)
    given = Problem(matrix, 2.0**-53, newton_schulz=NewtonSchulz(AOL, 1e-30, scaling="aol"))
    measured = measure_problem(given)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    for steps in range(5):
        output = iterate(by_entries(matrix), AOL[:steps])
        assert measured["ns_residual"][steps] == pytest.approx(np.linalg.norm(np.eye(24) - output @ output.T) / np.sqrt(24), abs=1e-11)
        # Square roots of Gram matrices; seen: 1e-10 here (κ = 1e3), 1e-7 at κ = 1e12.
        assert measured["ns_residual_polar"][steps] == pytest.approx(np.linalg.norm(output - u @ vt) / np.sqrt(24), abs=1e-8)
    # Read as divided by the Frobenius norm it would be another curve; the spectrum that is stored is M's either way.
    other = measure_problem(replace(given, newton_schulz=NewtonSchulz(AOL, 1e-30)))
    assert abs(other["ns_residual"][4] - measured["ns_residual"][4]) > 0.3
    assert (other["sigma_quantile"] == measured["sigma_quantile"]).all()


def test_the_polar_residual_has_a_floor():
    """However exact the iteration, it ends at the polar factor of diag(d)·M: ‖Q' − Q‖_F/√r stays."""
    matrix = np.diag([1.0, 1.0, 20.0]) @ gaussian(3, 5, 1)
    start = aol_start(matrix)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    scaled_u, _, scaled_vt = np.linalg.svd(by_entries(matrix), full_matrices=False)
    floor = np.linalg.norm(scaled_u @ scaled_vt - u @ vt) / np.sqrt(3)
    assert floor > 0.1
    assert float(polar_residual(np.ones(3), start.cosines)) == pytest.approx(floor, rel=1e-12)
