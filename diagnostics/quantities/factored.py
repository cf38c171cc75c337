"""What Adafactor loses: a second moment against its rank-1 form from row and column sums (Shazeer & Stern, arXiv 1804.04235)."""

from dataclasses import dataclass
from math import isfinite, log, nan, sqrt

import numpy as np
from numpy.typing import NDArray

from .panels import as_float64, row_panels

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rank1:
    """V against V̂₁ = (row sums)(column sums)/ΣV.

    Attributes:
        information: mutual information in nats.
        log_error, log_error_max: RMS and largest |log10(V/V̂₁)| over elements with V > 0, in decades.
    """

    information: float
    log_error: float
    log_error_max: float


def rank1(v: NDArray[np.floating]) -> Rank1:
    """How far V, of shape (rows, cols) and nowhere negative, is from rank 1.

    MI = Σ V/S·ln(V/V̂₁) with S = ΣV: V/S read as a joint distribution of row and column. 0 exactly for rank 1, at most
    ln min(rows, cols); S·MI is the I-divergence of V from V̂₁, the smallest that any rank-1 matrix has (the paper's eq. 3). Sums in
    float64: absolute error about 1e-15·ln(rows·cols). NaN where V is zero or not finite.

    >>> round(2 * rank1(np.eye(2)).information, 6)  # S = 2: an I-divergence of 2 ln 2
    1.386294
    >>> rank1(np.outer([1.0, 3.0], [2.0, 5.0])).log_error_max < 1e-15
    True
    """
    rows, columns = sums(v)
    total = float(rows.sum())
    if not isfinite(total) or total <= 0:
        return Rank1(nan, nan, nan)
    divergence, squares, largest, count = 0.0, 0.0, 0.0, 0
    for panel in row_panels(*v.shape):
        block = as_float64(v[panel])
        positive = block > 0
        expected = rows[panel, None] * (columns / total)
        # The quotient before the logarithm, so that equal numbers give 0; where V is 0 the term 0·ln 0 is 0.
        error = np.log(np.where(positive, block, 1.0) / np.where(positive, expected, 1.0))
        divergence += float((block * error).sum())
        squares += float((error * error).sum())
        largest = max(largest, float(np.abs(error).max()))
        count += int(np.count_nonzero(positive))
    decade = log(10)
    return Rank1(max(divergence / total, 0.0), sqrt(squares / count) / decade, largest / decade)


def sums(v: NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Sums over the columns, shape (rows,), and over the rows, shape (cols,), in float64."""
    return v.sum(axis=1, dtype=np.float64), v.sum(axis=0, dtype=np.float64)
