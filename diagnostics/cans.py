"""Chebyshev-optimal cubics for Newton–Schulz: two matrix products a step instead of a quintic's three.

Source: Grishina, Smirnov, Rakhuba, "Accelerating Newton–Schulz Iteration for Orthogonalization via Chebyshev-type Polynomials"
(CANS, arXiv 2506.10935).
"""

from math import sqrt

from .ns_families import Coefficients, Triple


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
