"""The Kronecker factors of Shampoo and SOAP: their condition, and whether the kept eigenbasis still is one."""

from math import nan

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# λ_min is taken to be at least this share of λ_max: a factor summed in float32 carries nothing below 1e-7 of it, one in float64 1e-15.
SMALLEST = 1e-12


def condition_and_rank(factor: NDArray[np.floating]) -> tuple[float, float]:
    """λ_max/max(λ_min, 1e-12·λ_max) and tr/λ_max of a symmetric positive semi-definite factor, by eigvalsh in float64.

    The second is the effective rank, between 1 and the number of rows. NaN where the factor is zero or not finite.

    >>> condition_and_rank(np.diag([4.0, 2.0, 2.0]))
    (2.0, 2.0)
    """
    factor = np.asarray(factor, dtype=np.float64)
    if not np.isfinite(factor).all():
        return nan, nan
    eigenvalues = np.linalg.eigvalsh(factor)
    largest = float(eigenvalues[-1])
    if largest <= 0:
        return nan, nan
    return largest / max(float(eigenvalues[0]), SMALLEST * largest), float(np.trace(factor)) / largest


def off_diagonal(factor: NDArray[np.floating], basis: NDArray[np.floating]) -> float:
    """1 − Σ_i (QᵀLQ)_ii²/‖QᵀLQ‖_F²: 0 where the columns of Q are eigenvectors of L; NaN where L is zero or not finite.

    >>> round(off_diagonal(np.ones((2, 2)), np.eye(2)), 12)
    0.5
    """
    basis = np.asarray(basis, dtype=np.float64)
    turned = basis.T @ np.asarray(factor, dtype=np.float64) @ basis
    energy = float((turned * turned).sum())
    if not np.isfinite(energy) or energy == 0:
        return nan
    # The sum off the diagonal itself: 1 − (its complement) would leave rounding of 1e-16.
    return float((turned * turned)[~np.eye(len(turned), dtype=bool)].sum()) / energy
