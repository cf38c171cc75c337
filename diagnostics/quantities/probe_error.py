"""Standard errors of the mean of a matrix's Hessian diagonal as random probes estimate it, from the first probe on."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The spread of n probes is itself wrong by 1/√(2(n − 1)): 71 % at two, 27 % at eight.
FEW_PROBES = 8


def probe_error(means: ArrayLike, variance_bounds: ArrayLike) -> float:
    """Standard error of the mean of `means`, each an estimate by one probe.

    From 8 probes on the spread between them, s/√n: unbiased as a variance, whatever the Hessian is. Below, the larger of that
    and of the mean bound √(Σ bound/n)/√n, so that two probes that happen to agree do not pass for certainty.

    Args:
        means: of single probes, shape (n,).
        variance_bounds: upper bounds on the variance of one such mean, as far as one probe can tell: `hutchinson_variance_bound`
            or `bartlett_variance_bound` of every probe, shape (n,).

    >>> probe_error([2.0], [0.25])
    0.5
    >>> probe_error([1.0, 1.0], [0.5, 0.5])  # they agree by chance: the bound stands
    0.5
    """
    values = np.asarray(means, dtype=np.float64)
    n = len(values)
    if n == 0:
        return math.nan
    between = float(np.var(values, ddof=1)) / n if n > 1 else 0.0
    bound = float(np.mean(np.asarray(variance_bounds, dtype=np.float64))) / n
    return math.sqrt(between if n >= FEW_PROBES else max(between, bound))


def hutchinson_variance_bound(mean: float, square: float, size: int, distribution: str) -> float:
    """Bound on the variance of one probe's mean of u⊙Hu over the d elements of a matrix, from that probe alone.

    With u over several matrices at once, H_jj the matrix's own block of the Hessian and H_j· its rows outside that block,

        d²·Var = 2‖H_jj‖_F² + ‖H_j·‖_F² (Gaussian),  2(‖H_jj‖_F² − Σ H_ii²) + ‖H_j·‖_F² (Rademacher).

    E‖(Hu)_j‖² = ‖H_jj‖_F² + ‖H_j·‖_F², and Σ H_ii² ≥ (Σ H_ii)²/d, hence the bounds 2‖(Hu)_j‖² and 2(‖(Hu)_j‖² − d·mean²). They are
    too large by up to √2 in the error where a matrix's coupling is to others, and without limit for Rademacher probes on a
    diagonal Hessian, whose own error is 0 and whose bound is the spread of the diagonal. They scatter with the probe: where
    one eigenvalue makes up the Hessian, 1.96 errors cover 74 % instead of 95 %.

    Args:
        mean: of u⊙Hu over the matrix's elements.
        square: mean of (Hu)² over them.
        size: d.
        distribution: "rademacher" or "gaussian".

    >>> hutchinson_variance_bound(1.0, 3.0, 4, "rademacher")
    1.0
    """
    spread = square if distribution == "gaussian" else square - mean * mean
    return 2 * spread / size


def bartlett_variance_bound(mean: float) -> float:
    """Bound on the variance of one draw's mean of B·ĝ⊙ĝ: 2·mean².

    For many labels √B·ĝ is Gaussian with the Gauss–Newton matrix F as covariance, and the mean has the variance 2‖F‖_F²/d², which
    is at most 2(tr F/d)²: reached by a matrix of rank one. With few labels, or labels of small probability, the fourth
    moments of the single gradients add to it.
    """
    return 2 * mean * mean


def debiased_rms(mean_square: float, square_of_mean: float, n: int) -> tuple[float, float]:
    """RMS of the true values under noise, and the RMS of one probe's noise, from n probes of every element.

    Args:
        mean_square: mean over elements and probes of the single values' squares.
        square_of_mean: mean over elements of the square of the mean over probes.
        n: probes; both are NaN under 2.

    >>> debiased_rms(2.0, 1.5, 2)  # noise of variance 1 (0.5 in the mean of two) on values of mean square 1
    (1.0, 1.0)
    """
    if n < 2:
        return math.nan, math.nan
    noise = max(mean_square - square_of_mean, 0.0) * n / (n - 1)
    return math.sqrt(max(square_of_mean - noise / n, 0.0)), math.sqrt(noise)


def level_quantiles(values: NDArray[np.floating[Any]], levels: ArrayLike) -> NDArray[np.float64]:
    """Quantiles of a matrix's elements."""
    found: NDArray[np.float64] = np.quantile(np.asarray(values, dtype=np.float64).ravel(), np.asarray(levels))
    return found
