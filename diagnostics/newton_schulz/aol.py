"""Almost-orthogonal (AOL) scaling: the start X₀ = diag(d)·M that Turbo-Muon gives its iteration in place of M/‖M‖_F.

d_i = (Σ_j |(MMᵀ)_ij|)^(−1/2) guarantees σ_1(X₀) ≤ 1 (arXiv 2208.03160). Rows are scaled unequally, so X₀ has other singular vectors
than M, and the iteration tends to another polar factor.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def aol_scaled(matrix: NDArray[np.floating], eps: float = 0.0) -> Floats:
    """diag(d)·M in float64, the scaled rows being those of the shorter side; row sums below `eps` count as `eps`. Zero rows stay zero.

    >>> aol_scaled(np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])).round(12).tolist()  # orthogonal rows become unit rows
    [[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]
    """
    short, d = _short_and_scale(matrix, eps)
    scaled = d[:, None] * short
    return scaled if matrix.shape[0] <= matrix.shape[1] else scaled.T


@dataclass(frozen=True)
class AolStart:
    """What the iteration starts from.

    Attributes:
        x: singular values of diag(d)·M, descending, shape (r,).
        cosines: u_iᵀ·Q·v_i with the singular vectors of diag(d)·M and the polar factor Q of M: 1 where the scaling turns nothing.
    """

    x: Floats
    cosines: Floats


def aol_start(matrix: NDArray[np.floating], eps: float = 0.0) -> AolStart:
    """Spectrum and turn of the scaled matrix, from the eigenvectors of two Gram matrices; the matrix is finite and not zero.

    With P = MMᵀ and D = diag(d): Q = P^(−1/2)·M and v_i = MᵀD·u_i/x_i, so u_iᵀQv_i = u_iᵀ·P^(1/2)·D·u_i/x_i. Square roots of
    eigenvalues are right to 1e-8 of the largest; residuals that follow were right to 1e-7 up to κ = 1e12, against SVDs. The cost is
    that of about five spectra (1024²: 0.7 s on one core).
    """
    short, d = _short_and_scale(matrix, eps)
    gram = short @ short.T
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    values, u = np.linalg.eigh(d[:, None] * gram * d)
    x = np.sqrt(values.clip(min=0))
    overlap = np.einsum("ji,ji->i", u, root @ (d[:, None] * u))
    # Rounding may take a cosine beyond 1. Of a direction that is not there it is of no account.
    cosines = np.divide(overlap, x, out=np.ones_like(x), where=x > 0).clip(-1, 1)
    return AolStart(x[::-1], cosines[::-1])


def _short_and_scale(matrix: NDArray[np.floating], eps: float) -> tuple[Floats, Floats]:
    """The matrix with its shorter side first, times a power of two, and d to go with it."""
    short = np.asarray(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T, dtype=np.float64)
    # A power of two near the largest entry keeps the squares of tiny or huge numbers inside float64 and rounds nothing.
    exponent = int(np.frexp(np.abs(short).max(initial=0.0))[1])
    short = np.ldexp(short, -exponent)
    sums = np.maximum(np.abs(short @ short.T).sum(axis=1), np.ldexp(eps, -2 * exponent))
    return short, np.divide(1, np.sqrt(sums), out=np.zeros_like(sums), where=sums > 0)
