"""Measuring a list of Newton–Schulz coefficients: what it does to singular values, in exact arithmetic and rounded to bfloat16.

Both are measured, since one does not follow from the other. A polynomial that is steep beyond the interval it was designed for amplifies what rounding pushes past its
end: lists without a safety factor keep their band in exact arithmetic and lose it in bfloat16, the more so the smaller the matrix, whose
largest x is nearer 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .facts import Validation
from .families import AfterLast, Coefficients, Family, Triple, cycled, repeat_last
from .hazards import LIFTED, Interval, attracting_cycle, escape, fixed_points, negative_intervals, output_band, restart
from .matrix_iteration import iterates, start_of, to_bfloat16
from .nearest_family import nearest_family
from .spectral_map import ns_map
from .verdict import verdict

# x at which the map is told, and the lower ends of the intervals over which its worst error is.
POINTS = tuple(10.0**-k for k in range(1, 7))
INTERVALS = (1e-2, 1e-3, 1e-4)
ENOUGH = 0.5  # where a small singular value counts as lifted
MAX_STEPS = 100
# The matrices that are iterated in bfloat16: of this shape, with each condition number, as many of each.
SHAPE = (32, 64)
CONDITION_NUMBERS = (1e2, 1e3, 1e4, 1e5)
SEEDS = 5
_FOLLOW = {"repeat": repeat_last, "cycle": cycled}


def validate(
    coefficients: Sequence[Sequence[float]],
    *,
    steps: int | None = None,
    after_last: AfterLast = "repeat",
    lower: float = LIFTED,
    scaling: str = "frobenius",
    bfloat16: bool = True,
) -> Validation:
    """Measure a schedule and find what is hazardous about it.

    Args:
        coefficients: (a, b, c) per step, acting on σ/‖M‖_F.
        steps: how many are taken; by default as many as there are triples.
        after_last: what follows the last triple: it is held, or the list begins anew.
        lower: lower end of the singular values whose output band is judged.
        scaling: "aol" where the list starts from diag(d)·M.
        bfloat16: also run the iteration in emulated bfloat16, on 20 small matrices (0.1 s).

    Raises:
        ValueError: no triples, ones that are not three finite numbers, or another argument out of its range.

    >>> validation = validate([(3.4445, -4.7750, 2.0315)] * 5)
    >>> [(hazard.rule, hazard.severity) for hazard in validation.hazards]
    [('no_convergence', 'info')]
    """
    given = _triples(coefficients)
    steps = len(given) if steps is None else steps
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps: expected 1 to {MAX_STEPS}, got {steps}")
    if len(given) > MAX_STEPS:
        raise ValueError(f"coefficients: expected at most {MAX_STEPS} triples, got {len(given):,}")
    if after_last not in ("repeat", "cycle", "exact"):
        raise ValueError(f"after_last: expected repeat, cycle or exact, got {after_last!r}")
    if after_last == "exact" and steps != len(given):
        raise ValueError(f"steps: the list is for exactly {len(given)} steps, got {steps}")
    if not 0 < lower < 1:
        raise ValueError(f"lower: expected a number between 0 and 1, got {lower}")
    run = cycled(given, steps) if after_last == "cycle" else repeat_last(given, steps)
    with np.errstate(over="ignore", invalid="ignore"):
        slope = float(np.prod([a for a, _, _ in run]))
    cycle = attracting_cycle(given[-1])
    facts = Validation(
        coefficients=run,
        slope=slope,
        lower=lower,
        band=output_band(run, (lower, 1.0)),
        worst={low: _worst(output_band(run, (low, 1.0))) for low in INTERVALS},
        reached=tuple(tuple(float(o) for o in ns_map(POINTS, run[:k])) for k in range(steps + 1)),
        lifted=tuple(_lifted(x, given) for x in POINTS),
        fixed_points=tuple((x, _derivative(given[-1], x)) for x in fixed_points(given[-1])),
        cycle=cycle,
        multiplier=float(np.prod([_derivative(given[-1], x) for x in cycle])) if cycle else float("nan"),
        escape=escape(run),
        negative=tuple(negative_intervals(run)),
        restart=restart(run),
        after_last=after_last,
        past_end={name: output_band(follow(given, len(given) + 1), (lower, 1.0)) for name, follow in _FOLLOW.items()},
        bfloat16=largest_in_bfloat16(run, scaling) if bfloat16 else float("nan"),
        nearest=nearest_family(given),
    )
    return replace(facts, hazards=verdict(facts))


def of_family(family: Family, steps: int | None = None) -> Validation:
    """:func:`validate` of a known family, for as many steps as its authors take, or, the last triple held, any other number."""
    own, length = family.steps if steps is None else steps, len(family.coefficients)
    as_theirs = own == length or (family.after_last == "cycle" and own < length)
    return validate(family.coefficients, steps=own, after_last=family.after_last if as_theirs else "repeat", scaling=family.scaling)


def largest_in_bfloat16(coefficients: Coefficients, scaling: str = "frobenius") -> float:
    """Largest singular value of O over 20 built matrices of 32×64, iterated in emulated bfloat16; infinite where one overflows.

    Their singular values are log-uniform from 1 to 1/κ, κ = 1e2 … 1e5, with singular vectors of five fixed seeds each. At 128×256 the
    same lists fail, less far (exact minimax 1.8 instead of 59).
    """
    largest = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for matrix in _matrices():
            *_, (output, _) = iterates(start_of(matrix, 0.0, scaling, to_bfloat16), coefficients, to_bfloat16)
            if not np.isfinite(output).all():
                return float("inf")
            largest = max(largest, float(np.linalg.norm(output.astype(np.float64), 2)))
    return largest


def _triples(coefficients: Sequence[Sequence[float]]) -> Coefficients:
    if isinstance(coefficients, (str, bytes, Mapping)) or not isinstance(coefficients, Sequence):
        raise ValueError(f"coefficients: expected a list of (a, b, c) triples, got {type(coefficients).__name__}")
    if not coefficients:
        raise ValueError("coefficients: expected at least one (a, b, c) triple, got none")
    triples: list[Triple] = []
    for t, row in enumerate(coefficients, start=1):
        if isinstance(row, (str, bytes)) or not isinstance(row, Sequence) or len(row) != 3:
            raise ValueError(f"coefficients: expected three numbers (a, b, c) in row {t}, got {row!r:.60}")
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in row):
            raise ValueError(f"coefficients: expected three numbers (a, b, c) in row {t}, got {row!r:.60}")
        # An integer may be too large for a float.
        if not all(abs(value) < 1e100 for value in row):
            raise ValueError(f"coefficients: expected finite numbers below 1e100 in row {t}, got {row!r:.60}")
        triples.append((float(row[0]), float(row[1]), float(row[2])))
    return tuple(triples)


def _worst(band: Interval) -> float:
    return max(abs(1 - band[0]), abs(1 - band[1]))


def _lifted(x: float, given: Coefficients) -> int | None:
    for k, triple in enumerate(repeat_last(given, MAX_STEPS)):
        if x >= ENOUGH:
            return k
        x = float(ns_map(x, (triple,)))
    return None


def _derivative(triple: Triple, x: float) -> float:
    a, b, c = triple
    return a + x * x * (3 * b + 5 * c * x * x)


@cache
def _matrices() -> tuple[NDArray[np.float64], ...]:
    rows, cols = SHAPE
    made = []
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        u = np.linalg.qr(random.standard_normal((rows, rows)))[0]
        v = np.linalg.qr(random.standard_normal((cols, rows)))[0]
        made += [(u * np.logspace(0, -np.log10(kappa), rows)) @ v.T for kappa in CONDITION_NUMBERS]
    return tuple(made)
