"""Gram Newton–Schulz: the iteration carried by the r×r Gram matrix alone, cheaper than the standard one where a matrix is far from square.

R = XXᵀ, Q = I; per step Z = bR + cR², Q ← QZ + aQ, R ← Z(RZ + aR) + a(RZ + aR); the output is QX. In exact arithmetic it is the
standard iteration. In low precision R loses the small singular values, whose squares it holds, so that a restart (X ← QX, R ← XXᵀ, Q ← I)
is needed on the way. Source: Zhang, Amsel, Chen, Dao, "Gram Newton–Schulz" (2026); theirs restarts once, before the third step, in float16.
"""

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .ns_families import Coefficients

Matrix: TypeAlias = NDArray[Any]


def gram_newton_schulz(
    start: Matrix, coefficients: Coefficients, restarts: Collection[int] = (), rounded: Callable[[Matrix], Matrix] = lambda x: x
) -> Matrix:
    """O from X₀ = `start`, shape (m, n), in its own precision (float32 or float64).

    Args:
        start: X₀, of norm about 1 (:func:`.matrix_iteration.start_of`).
        coefficients: (a, b, c) of every step.
        restarts: steps, counted from 0, before which X, R and Q are made anew.
        rounded: applied to what every product gives, :func:`.matrix_iteration.to_bfloat16` for example.
    """
    x = rounded(start if start.shape[0] <= start.shape[1] else start.T)
    q, r = np.eye(len(x), dtype=x.dtype), rounded(x @ x.T)
    for step, (a, b, c) in enumerate(coefficients):
        if step in restarts:
            x = rounded(q @ x)
            q, r = np.eye(len(x), dtype=x.dtype), rounded(x @ x.T)
        z = rounded(b * r + c * (r @ r))
        q = rounded(q @ z + a * q)
        half = rounded(r @ z + a * r)
        r = rounded(z @ half + a * half)
    output = rounded(q @ x)
    return output if start.shape[0] <= start.shape[1] else output.T


def gram_flops(rows: int, cols: int, steps: int, restarts: int = 1) -> int:
    """FLOPs of `steps` steps, r and q being the short and long side: 4r²q(restarts + 1) for X and R = XXᵀ, and 2r³ for each product of r×r.

    R² takes one product in every step, Q one but after a start, where it is I, and R two but before a restart and at the end, where it is
    not needed. At r = q and five steps this is 1.2 times the standard iteration, which they keep there; at q = 3r it is 0.74.
    """
    r, q = min(rows, cols), max(rows, cols)
    starts = restarts + 1
    squares = steps + (steps - starts) + 2 * (steps - starts)
    return 2 * (2 * starts * r * r * q + squares * r**3)
