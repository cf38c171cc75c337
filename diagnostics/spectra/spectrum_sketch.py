"""A spectrum in 64 numbers: which singular values are stored, and how the spectrum is read back from them.

Distributions in as many bits as they deserve: what is measured, what a schedule is derived from, and what is stored are the same numbers.
"""

from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

POINTS = 64
# Kept exactly: residuals hang on the few largest values, where gaps are wide and polynomials steep, and on the smallest.
SMALLEST, LARGEST = 4, 20
# Stands for σ = 0 where a logarithm is taken; any schedule maps it to 0.
TINY = 1e-30


@cache
def sketch_indices(rank: int) -> NDArray[np.int64]:
    """Which of `rank` singular values in ascending order are kept, shape (64,), both extremes among them.

    All of them when rank ≤ 64 (repeated to fill). Otherwise the 4 smallest, the 20 largest and 40 between whose spacing
    grows as a power law from one index at the small end, so that the lower tail stays dense at any rank.
    """
    if rank <= POINTS:
        return np.rint(np.linspace(0, rank - 1, POINTS)).astype(np.int64)
    between = POINTS - SMALLEST - LARGEST
    span = rank - LARGEST - SMALLEST + 1
    power = np.log(span) / np.log(between + 1)
    middle = SMALLEST - 1 + np.rint(np.arange(1, between + 1) ** power)
    return np.concatenate([np.arange(SMALLEST), middle, np.arange(rank - LARGEST, rank)]).astype(np.int64)


def sketch_levels(rank: int) -> Floats:
    """Quantile levels of the kept values: index/(rank − 1), shape (64,); 0 is the smallest σ, 1 the largest."""
    return sketch_indices(rank) / max(rank - 1, 1)


def sketch(normalised: ArrayLike) -> Floats:
    """64 of the normalised singular values x = σ/‖M‖_F (shape (r,), descending), ascending, shape (64,)."""
    ascending = np.asarray(normalised, dtype=np.float64)[::-1]
    return ascending[sketch_indices(len(ascending))]


def unsketch(stored: ArrayLike, rank: int) -> Floats:
    """All `rank` normalised singular values, descending, from the 64 stored: log x linear in the index between them.

    Exact when rank ≤ 64. Beyond, what is lost is the scatter of single values between stored neighbours. On the momenta
    of a trained 128-wide model 99 % of the residuals lie within 6.5e-3 of the full spectrum's, within 1.4e-2 after the first
    3 or 4 steps of Polar Express, which oscillate around 1; the mean over an operator within 0.3 % (`benchmarks/sketch_error.py`).

    Args:
        stored: shape (..., 64), as from :func:`sketch`.
        rank: r, at least 1.
    """
    logs = np.log(np.maximum(np.asarray(stored, dtype=np.float64), TINY))
    # Between neighbours the weights depend on the rank only: one gather for any number of spectra.
    indices = sketch_indices(rank)
    position = np.arange(rank)
    right = np.clip(np.searchsorted(indices, position), 1, POINTS - 1)
    gap = np.maximum(indices[right] - indices[right - 1], 1)
    weight = (position - indices[right - 1]) / gap
    ascending = np.exp(logs[..., right - 1] * (1 - weight) + logs[..., right] * weight)
    return np.asarray(ascending[..., ::-1])


MANTISSA = 12  # bits after the point
_DROPPED = np.uint64(52 - MANTISSA)  # of a float64


def rounded(values: ArrayLike) -> NDArray[np.float64]:
    """Values with 12 bits of mantissa, which float32 holds exactly; ties to even. Same shape.

    Relative error at most 2⁻¹³ = 1.2·10⁻⁴, which is under that of 64 points in the place of a spectrum; the 11 bits of a float32 that are
    zero for all of them compress to nothing. Under 2⁻¹²⁶, where float32 has fewer bits, the error is at most 2⁻¹³⁹; above its range the result is inf.

    >>> rounded([1.0, 1 + 2**-12, 1 + 2**-13, 1 + 3 * 2**-13]).tolist() == [1.0, 1 + 2**-12, 1.0, 1 + 2 * 2**-12]
    True
    """
    exact = np.array(values, dtype=np.float64)
    bits = exact.view(np.uint64)
    half = (np.uint64(1) << (_DROPPED - np.uint64(1))) - np.uint64(1)
    kept = ((bits + half + ((bits >> _DROPPED) & np.uint64(1))) >> _DROPPED) << _DROPPED
    with np.errstate(over="ignore"):
        return np.where(np.isfinite(exact), kept.view(np.float64), exact).astype(np.float32).astype(np.float64)
