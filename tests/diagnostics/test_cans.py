"""Optimal cubics against a linear program, the published errors, and the least singular value they can lift."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from optiscope.diagnostics.cans import cans_cubics, delta_orthogonalising, optimal_cubic
from optiscope.diagnostics.ns_hazards import output_band


def composed(x, triples):
    for a, b, _ in triples:
        x = a * x + b * x**3
    return x


@pytest.mark.parametrize(("low", "high"), [(0.01, 1.0), (0.3, 1.0), (0.2, 1.8)])
def test_one_cubic_is_that_of_a_linear_program(low, high):
    x = np.linspace(low, high, 2001)
    basis, one = np.stack([x, x**3], axis=1), np.ones((2001, 1))
    rows, right = np.block([[basis, -one], [-basis, -one]]), np.concatenate([one, -one]).ravel()
    solved = linprog([0, 0, 1], A_ub=rows, b_ub=right, bounds=[(None, None)] * 2 + [(0, None)])
    (a, b, c), error = optimal_cubic(low, high)
    # The grid misses the maximum by O(spacing²): 7e-8 measured.
    assert (a, b, error) == pytest.approx(tuple(solved.x), abs=5e-7)
    assert c == 0


@given(st.floats(1e-4, 1.8), st.floats(1.01, 50))
def test_the_error_is_taken_three_times_in_turn(low, ratio):
    high = low * ratio
    (a, b, _), error = optimal_cubic(low, high)
    x = np.array([low, np.sqrt((low**2 + low * high + high**2) / 3), high])
    # Measured: 2.4e-15 over 20,000 draws.
    assert 1 - (a * x + b * x**3) == pytest.approx(error * np.array([1, -1, 1]), abs=1e-13)


@pytest.mark.parametrize(("steps", "printed"), [(5, 0.796), (8, 0.054)])
def test_the_best_cubics_from_a_thousandth(steps, printed):
    o = composed(np.geomspace(1e-3, 1, 200_001), cans_cubics(1e-3, steps))
    assert np.abs(1 - o).max() == pytest.approx(printed, abs=5e-4)


@given(st.floats(0.01, 0.9), st.integers(1, 8))
def test_delta_orthogonalising_reaches_delta_and_no_smaller_value_does(delta, steps):
    triples, lower = delta_orthogonalising(delta, steps)
    low, high = output_band(triples, (lower, 1.0))
    # A narrow δ is a difference of nearly equal numbers: 1.2e-12 measured over 12,000 draws.
    assert (1 - low, high - 1) == pytest.approx((delta, delta), abs=1e-11)
    smaller = composed(np.array([lower * 0.99]), cans_cubics(lower * 0.99, steps))
    assert abs(1 - smaller[0]) > delta


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cans_cubics(0.0, 3), r"^lower: expected a number between 0 and 1, got 0.0$"),
        (lambda: cans_cubics(0.1, 0), r"^steps: expected at least 1, got 0$"),
        (lambda: delta_orthogonalising(1.0, 3), r"^delta: expected a number between 0 and 1, got 1.0$"),
        (lambda: delta_orthogonalising(0.1, 0), r"^steps: expected at least 1, got 0$"),
    ],
)
def test_an_argument_outside_its_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
