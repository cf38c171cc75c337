"""Whether a schedule keeps its band where the iteration is rounded to bfloat16.

A polynomial that is steep beyond the interval it was designed for amplifies what rounding pushes past its end: lists without safety factor
keep their band in exact arithmetic and lose it in bfloat16, the more so the smaller the matrix, whose largest x is nearer 1.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from .matrix_iteration import iterates, start_of, to_bfloat16
from .ns_families import Coefficients

CONDITION_NUMBERS = (1e2, 1e3, 1e4, 1e5)
SEEDS = 5
SHAPE = (32, 64)


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
