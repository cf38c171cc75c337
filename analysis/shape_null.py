"""What a matrix's shape alone makes of its condition number: the null that κ is compared with.

A Gaussian matrix of aspect β = r/q has κ near (1 + √β)/(1 − √β) (2:1 5.83, 3:1 3.73, 4:1 3), but a square one κ of order n:
P(κ/n < x) → exp(−2/x − 2/x²), median 3.67 (Edelman 1988). Operators differ in shape, so a ranking by κ may rank shapes.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

# Beyond this short side κ follows the law above: constant at fixed aspect, linear in n when square.
LARGEST_DRAWN, DRAWS = 128, 64
GRID = 20_000  # points of the integral over a spectrum's law


@cache
def null_log10_condition(rows: int, cols: int, worst_of: int = 1) -> float:
    """Median of log10 κ over Gaussian matrices of that shape, from 64 draws with a fixed seed (error about 0.05 when square).

    A short side above 128 is drawn at 128 and the same aspect; for a square matrix log10(n/128) is added. Of the largest κ of
    `worst_of` independent matrices the median is the 2^(−1/worst_of) quantile of a single one's.
    """
    r, q = min(rows, cols), max(rows, cols)
    short = min(r, LARGEST_DRAWN)
    rng = np.random.default_rng(0)
    gaussians = (rng.standard_normal((short, round(q * short / r))) for _ in range(DRAWS))  # one at a time: a head's rows are wide
    # Eigenvalues of the Gram matrices: several times quicker than an SVD, and right to 1e-6 for the largest κ that is drawn.
    squares = np.linalg.eigvalsh(np.stack([gaussian @ gaussian.T for gaussian in gaussians]))
    median = float(np.quantile(np.log10(squares[:, -1] / squares[:, 0]), 0.5 ** (1 / worst_of))) / 2
    return median + (float(np.log10(r / short)) if r == q else 0.0)


@cache
def null_spectrum(rows: int, cols: int) -> NDArray[np.float64]:
    """Normalised singular values σ/‖M‖_F of a Gaussian matrix of that shape, descending, shape (r,), without a draw.

    Quantiles (i − ½)/r of the Marčenko–Pastur law with β = r/q: σ²/q between (1 − √β)² and (1 + √β)², of density
    √((b − s)(s − a))/(2πβs). Exact for large matrices; a single value is off by its own scatter.
    """
    r, q = min(rows, cols), max(rows, cols)
    beta = r / q
    low, high = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2
    # In the angle the density has no singularity but, where the matrix is square, at 0: there it is that of a quarter circle.
    angle = (np.arange(GRID) + 0.5) * np.pi / GRID
    square = (high + low) / 2 - (high - low) / 2 * np.cos(angle)
    density = np.sin(angle) ** 2 / square
    share = (np.cumsum(density) - density / 2) / density.sum()
    sigma = np.sqrt(np.interp((np.arange(r) + 0.5) / r, share, square))[::-1]
    return np.asarray(sigma / np.linalg.norm(sigma))
