"""What a variance-reduced optimizer (MARS) makes of the gradient: C = G + γβ/(1 − β)·(G − G_last), clipped to ‖C‖_F ≤ 1."""

import numpy as np
from numpy.typing import NDArray


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """⟨A, B⟩/(‖A‖_F‖B‖_F) in float64; NaN where one is zero or not finite.

    >>> cosine(np.array([[3.0, 4.0]]), np.array([[30.0, 40.0]]))
    1.0
    """
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    # Each at its own scale first: squares of tiny numbers would leave float64.
    a, b = (x / (np.abs(x).max(initial=0.0) or np.nan) for x in (a, b))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def variance_ratio(corrected: NDArray[np.floating], gradient: NDArray[np.floating]) -> float:
    """Var(C)/Var(G) over the matrices' elements, in float64; NaN where G is constant.

    Clipping counts: where ‖C‖_F was cut to 1 the ratio is that of what the optimizer averages, not of the correction alone.

    >>> variance_ratio(np.array([1.0, 5.0]), np.array([1.0, 3.0]))
    4.0
    """
    of_gradient = float(np.var(gradient, dtype=np.float64))
    return float(np.var(corrected, dtype=np.float64)) / of_gradient if of_gradient else float("nan")
