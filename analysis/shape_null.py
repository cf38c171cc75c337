"""What a matrix's shape alone makes of its condition number: the null that κ is compared with.

A Gaussian matrix of aspect β = r/q has κ near (1 + √β)/(1 − √β) (2:1 5.83, 3:1 3.73, 4:1 3), but a square one κ of order n:
P(κ/n < x) → exp(−2/x − 2/x²), median 3.67 (Edelman 1988). Operators differ in shape, so a ranking by κ may rank shapes.
"""

from functools import cache

import numpy as np

# Beyond this short side κ follows the law above: constant at fixed aspect, linear in n when square.
LARGEST_DRAWN, DRAWS = 128, 64


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
