"""What can go wrong with a Newton–Schulz schedule, told from its scalar maps p(x) = a·x + b·x³ + c·x⁵ alone.

A schedule acts on every singular value x = σ/‖M‖_F ∈ (0, 1] by the composition of its polynomials. These are continuous, so the image of
an interval is the interval between its extremes, which lie at its ends or where p′ = 0; all functions here are exact but for rounding.
What float64 does to these maps is not what bfloat16 does: a list without safety factor may pass here and still be unstable there.
"""

from itertools import pairwise
from math import inf, sqrt
from typing import NamedTuple, TypeAlias

import numpy as np

from .families import Coefficients, Triple
from .spectral_map import ns_map

Interval: TypeAlias = tuple[float, float]

# A spectrum's values under this are a matter of the number of steps; from here on every schedule in use has lifted them.
LIFTED = 1e-2
# Beyond this an iterate has left for infinity.
_ESCAPED = 1e6
# Sign changes that are told apart: those of a list that folds (0, 1] over and over multiply with every step.
_SIGN_CHANGES = 512


class Escape(NamedTuple):
    """Values after `step` steps reach `reached`, beyond `bound`, outside which the polynomial of the next step only enlarges them."""

    step: int
    reached: float
    bound: float


def image(triple: Triple, interval: Interval) -> Interval:
    """Smallest and largest value of p on an interval.

    >>> image((1.5, -0.5, 0.0), (0.0, 2.0))  # 0 at 0, 1 at its maximum, −1 at 2
    (-1.0, 1.0)
    """
    low, high = interval
    if not -_ESCAPED < low <= high < _ESCAPED:
        return -inf, inf
    a, b, c = triple
    turning = [sign * sqrt(y) for y in _quadratic_roots(a, 3 * b, 5 * c) if y > 0 for sign in (1, -1)]
    values = [_value(triple, x) for x in (low, high, *(x for x in turning if low < x < high))]
    return min(values), max(values)


def output_band(coefficients: Coefficients, domain: Interval = (LIFTED, 1.0)) -> Interval:
    """Smallest and largest singular value that a schedule makes of those in `domain`.

    >>> low, high = output_band(((3.4445, -4.7750, 2.0315),) * 5)
    >>> round(low, 3), round(high, 3)
    (0.682, 1.134)
    """
    for triple in coefficients:
        domain = image(triple, domain)
    return domain


def escape_radius(triple: Triple) -> float:
    """The largest |x| with |p(x)| = |x|: values beyond it grow with every further step. Infinite where p is linear.

    Where p ends above the identity this is its largest fixed point, and a local maximum must stay under it.

    >>> round(escape_radius((3.4445, -4.7750, 2.0315)), 4)
    1.2637
    """
    a, b, c = triple
    crossings = [*_quadratic_roots(a - 1, b, c), *_quadratic_roots(a + 1, b, c)]
    return sqrt(max((y for y in crossings if y > 0), default=inf))


def fixed_points(triple: Triple) -> list[float]:
    """Positive x with p(x) = x, ascending.

    >>> fixed_points((1.5, -0.5, 0.0))
    [1.0]
    """
    a, b, c = triple
    return sorted(sqrt(y) for y in _quadratic_roots(a - 1, b, c) if y > 0)


def escape(coefficients: Coefficients, reach: float = 1.0) -> Escape | None:
    """The first step at which a value of (0, reach] leaves the escape radius of the step to come; None where none does.

    A value just outside grows slowly at first (ROOT's coefficients for 2048×2048: 1.2246 beyond 1.2236, 3.3 after five steps).
    """
    domain = 0.0, reach
    for step, triple in enumerate(coefficients):
        reached, bound = max(-domain[0], domain[1]), escape_radius(triple)
        # A fixed point that is also the maximum (1 of the classical iterations) is reached, and left to rounding.
        if reached > bound * (1 + 1e-9) and step > 0:
            return Escape(step, reached, bound)
        domain = image(triple, domain)
    return None


def negative_intervals(coefficients: Coefficients, reach: float = 1.0) -> list[Interval]:
    """Where in (0, reach] the schedule makes singular values negative: it reverses the update in those directions.

    Sign changes are the zeros of one step's polynomial pulled back through the steps before it. Of a list that makes more than 512, those
    of its first steps that make fewer.

    >>> [(round(low, 4), high) for low, high in negative_intervals(((4.0098, -7.0585, 2.4635),))]
    [(0.8837, 1.0)]
    """
    changes: set[float] = set()
    domains = [(0.0, reach)]
    for step, (a, b, c) in enumerate(coefficients):
        zeros = {sign * sqrt(y) for y in _quadratic_roots(a, b, c) if y > 0 for sign in (1, -1)}
        for earlier, (low, high) in zip(reversed(coefficients[:step]), reversed(domains[:-1]), strict=True):
            zeros = {x for zero in zeros for x in _preimages(earlier, zero) if low <= x <= high}
            if len(zeros) > _SIGN_CHANGES:
                break
        if len(changes | zeros) > _SIGN_CHANGES:
            coefficients = coefficients[:step]
            break
        changes |= {x for x in zeros if 0 < x < reach}
        domains.append(image((a, b, c), domains[-1]))
    ends = [0.0, *sorted(changes), reach]
    pieces = [(low, high) for low, high in pairwise(ends) if ns_map((low + high) / 2, coefficients) < 0]
    joined: list[Interval] = []
    for low, high in pieces:
        if joined and joined[-1][1] == low:
            low = joined.pop()[0]
        joined.append((low, high))
    return joined


def restart(coefficients: Coefficients) -> int | None:
    """The step, counted from 0, at which a list of different triples begins anew; None where it does not.

    A list is made for its order: its first polynomials expect values that are still small.
    """
    first = coefficients[0] if coefficients else None
    return next((t for t in range(2, len(coefficients)) if coefficients[t] == first != coefficients[t - 1]), None)


def attracting_cycle(triple: Triple) -> tuple[float, ...]:
    """The positive cycle that iterating one polynomial ends in, from its smallest value; (1.0,) where it converges, () if none is found.

    An attracting cycle of a polynomial attracts one of the points where p′ = 0 (Fatou), so that following these finds it.

    >>> [round(x, 4) for x in attracting_cycle((3.4445, -4.7750, 2.0315))]
    [0.6819, 1.1343, 0.7529, 1.0469]
    """
    a, b, c = triple
    for start in (sqrt(y) for y in _quadratic_roots(a, 3 * b, 5 * c) if y > 0):
        x = float(ns_map(start, (triple,) * 1000))
        orbit = [x]
        while abs(x) < _ESCAPED and len(orbit) < 64:
            x = _value(triple, x)
            if abs(x - orbit[0]) < 1e-9:
                if max(orbit) - min(orbit) < 1e-4:  # a fixed point that is neared slowly, from both sides
                    return (sum(orbit) / len(orbit),)
                least = orbit.index(min(orbit))
                return tuple(orbit[least:] + orbit[:least])
            orbit.append(x)
    return ()


def _value(triple: Triple, x: float) -> float:
    a, b, c = triple
    return x * (a + x * x * (b + x * x * c))


def _quadratic_roots(constant: float, linear: float, square: float) -> list[float]:
    """Real roots of constant + linear·y + square·y²."""
    return _real_roots([square, linear, constant])


def _preimages(triple: Triple, value: float) -> list[float]:
    a, b, c = triple
    return _real_roots([c, 0.0, b, 0.0, a, -value])


def _real_roots(polynomial: list[float]) -> list[float]:
    # A coefficient that is nothing beside the largest would overflow what is divided by it, for a root that is as good as infinite.
    nothing = 1e-200 * max(map(abs, polynomial))
    told = [value if abs(value) > nothing else 0.0 for value in polynomial]
    return [float(root.real) for root in np.roots(told) if abs(root.imag) <= 1e-9 * max(1.0, abs(root))]
