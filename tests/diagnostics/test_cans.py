"""Optimal cubics against a linear program, the published errors, and the least singular value they can lift.

Chebyshev-optimal cubics for Newton–Schulz: two matrix products a step instead of a quintic's three.

Source: Grishina, Smirnov, Rakhuba, "Accelerating Newton–Schulz Iteration for Orthogonalization via Chebyshev-type Polynomials"
(CANS, arXiv 2506.10935).
"""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from optiscope.diagnostics.newton_schulz.families import Coefficients, Triple
from optiscope.diagnostics.newton_schulz.hazards import output_band


def optimal_cubic(low: float, high: float) -> tuple[Triple, float]:
    """The odd cubic closest to 1 on [low, high], 0 < low < high, and its largest error, which it takes three times in turn.

    With A = low, B = high, e² = (A² + AB + B²)/3 and k = 2/(2e³ + A²B + AB²): p(x) = 3ke²·x − k·x³, in error by
    (2e³ − A²B − AB²)/(2e³ + A²B + AB²) at A, e and B.

    >>> (a, b, c), error = optimal_cubic(1.0, 1.0)  # the classical cubic is its limit
    >>> (a, b, c, error)
    (1.5, -0.5, 0.0, 0.0)
    """
    square = (low * low + low * high + high * high) / 3
    peak, ends = 2 * square * sqrt(square), low * high * (low + high)
    k = 2 / (peak + ends)
    return (3 * k * square, -k, 0.0), max(0.0, (peak - ends) / (peak + ends))


def cans_cubics(lower: float, steps: int) -> Coefficients:
    """Cubics whose composition maps [lower, 1] as close to 1 as any composition of that length and degree can.

    Each is the optimal cubic of the interval [1 − error, 1 + error] that the one before it leaves.

    Raises:
        ValueError: `lower` is not between 0 and 1, or `steps` is below 1.
    """
    return _composed(lower, steps)[0]


def delta_orthogonalising(delta: float, steps: int) -> tuple[Coefficients, float]:
    """Cubics that end in [1 − δ, 1 + δ] from as small a singular value as `steps` of them can lift there, and that value.

    Found by bisection, to rounding: the error of the composition falls as its lower end rises.

    Raises:
        ValueError: `delta` is not between 0 and 1, or `steps` is below 1.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta}")
    small, large = 1e-300, 1.0
    # In logarithms until the ends are as near as a factor of two, then as they are.
    while large - small > 4e-16 * large:
        middle = sqrt(small) * sqrt(large) if large > 2 * small else (small + large) / 2
        if _composed(middle, steps)[1] > delta:
            small = middle
        else:
            large = middle
    return _composed(large, steps)[0], large


def _composed(lower: float, steps: int) -> tuple[Coefficients, float]:
    if not 0 < lower < 1:
        raise ValueError(f"lower: expected a number between 0 and 1, got {lower}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    low, high, error = lower, 1.0, 1.0
    triples: list[Triple] = []
    for _ in range(steps):
        triple, error = optimal_cubic(low, high)
        triples.append(triple)
        low, high = 1 - error, 1 + error
    return tuple(triples), error


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
