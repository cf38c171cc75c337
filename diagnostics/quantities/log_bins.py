"""Quantiles over all elements of a matrix at the cost of counting them: bins made of the numbers' own bits.

Sign, exponent and the first four bits of the mantissa, read as one integer, are logarithmic bins of relative width 2⁻⁴ at most, in
the order of the magnitudes. No logarithm, no sort and no range to choose; zeros, denormals and infinities have bins like all else.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WIDTH = 2.0**-4  # of a bin, relative to its lower edge
_MANTISSA = 4  # bits of it that count
_PANEL = 1 << 16  # elements counted at once

# Format: unsigned integer of its size, bits of its whole mantissa.
_FORMATS: dict[np.dtype[Any], tuple[np.dtype[Any], int]] = {
    np.dtype(np.float32): (np.dtype(np.uint32), 23),
    np.dtype(np.float64): (np.dtype(np.uint64), 52),
}


def log_quantiles(values: NDArray[np.floating], levels: Sequence[float]) -> Floats:
    """The order statistics of rank ⌊level·(n − 1)⌋, right to the width of a bin: relative error at most 2⁻⁴.

    Exact at the levels 0 and 1, and for zeros. Denormals (under 1.2e-38 in float32) share bins of absolute width 2⁻¹³⁰. NaN
    throughout where one of the values is NaN, or there are none. Numbers of another format than float64 are taken as float32.

    >>> log_quantiles(np.array([0.0, 1.0, 2.0, 1000.0]), (0.0, 0.4, 0.7, 1.0)).tolist()
    [0.0, 1.03125, 2.0625, 1000.0]
    """
    flat = np.ascontiguousarray(values if values.dtype == np.float64 else values.astype(np.float32, copy=False)).ravel()
    smallest, largest = (float(flat.min()), float(flat.max())) if flat.size else (np.nan, np.nan)
    if np.isnan(smallest):
        return np.full(len(levels), np.nan)
    counts = _counts(flat)
    half = len(counts) // 2
    # From the most negative to the largest.
    ordered = np.concatenate([np.arange(len(counts) - 1, half - 1, -1), np.arange(half)])
    upto = np.cumsum(counts[ordered])
    ranks = np.floor(np.asarray(levels) * (flat.size - 1)).astype(np.int64)
    places = np.searchsorted(upto, ranks, side="right")
    within = (ranks - (upto - counts[ordered])[places] + 0.5) / counts[ordered][places]
    negative = ordered[places] >= half
    with np.errstate(invalid="ignore"):  # after infinity comes NaN
        lower, upper = _edges(flat.dtype, ordered[places] % half)
        magnitude = np.where(np.isinf(lower), lower, lower + (upper - lower) * np.where(negative, 1 - within, within))
    found = np.where(negative, -magnitude, magnitude)
    if counts[0] or counts[half]:  # where zeros are, of either sign, among what is nearly zero
        below_zero = int(np.count_nonzero(flat < 0)) if smallest < 0 else 0
        found[(ranks >= below_zero) & (ranks < below_zero + flat.size - np.count_nonzero(flat))] = 0.0
    found[ranks == 0], found[ranks == flat.size - 1] = smallest, largest
    return np.clip(found, smallest, largest)


def _counts(flat: NDArray[np.floating]) -> NDArray[np.int64]:
    """How many numbers fall into each bin, those below zero in the upper half."""
    integer, mantissa = _FORMATS[flat.dtype]
    bits = flat.view(integer)
    bins = 1 << (8 * integer.itemsize - mantissa + _MANTISSA)
    counts = np.zeros(bins, dtype=np.int64)
    for start in range(0, len(bits), _PANEL):
        counts += np.bincount((bits[start : start + _PANEL] >> np.asarray(mantissa - _MANTISSA, integer)).astype(np.intp), minlength=bins)
    return counts


def _edges(kind: np.dtype[np.floating], bins: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Magnitudes at which bins begin and end."""
    integer, mantissa = _FORMATS[kind]
    shift = mantissa - _MANTISSA
    lower, upper = ((bins + one << shift).astype(integer).view(kind).astype(np.float64) for one in (0, 1))
    return lower, np.minimum(upper, float(np.finfo(kind).max))
