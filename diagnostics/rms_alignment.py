"""How large an update is beside its target, and how much of the difference the Newton–Schulz iteration explains.

With ΔW = −η·s·O and O of rank r = min(m, n), a = RMS(ΔW/η)/(s/√max(m, n)) satisfies a² = mean_i o_i² for every scaling s. Source:
AdaMuon Eq. 9–10, Moonlight (arXiv 2502.16982).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .newton_schulz import ns_map
from .recorded_spectra import NsSchedule, read_back
from .update_size import READABLE_NOISE

Floats = NDArray[np.float64]

# o below this is counted as under-lifted: an NS budget problem; the rest of a² − 1 is the coefficients' band.
UNDER_LIFTED = 0.5
# How far a may lie outside a bound: reading ΔW and bfloat16 arithmetic each move it by under 1 %.
SLACK = 0.02


def known_size(applied: ArrayLike, intended: ArrayLike) -> Floats:
    """RMS of the update per learning rate: of the one intended, where weights are too coarse to tell it, else of the one applied."""
    return np.where(np.isfinite(intended), intended, applied)


def is_readable(noise: ArrayLike, intended: ArrayLike) -> NDArray[np.bool_]:
    """Whether that size is known: rounding noise of the applied update up to 0.01, or the intended one recorded."""
    return np.asarray(np.less_equal(noise, READABLE_NOISE) | np.isfinite(intended))


def explained(residual: ArrayLike) -> tuple[Floats, Floats]:
    """Least and largest a that a Gram residual ε̃ explains: |a² − 1| ≤ ε̃ by Jensen's inequality, each end 2 % wider.

    >>> low, high = explained(0.36)
    >>> round(float(low), 3), round(float(high), 3)  # 0.98·0.8, 1.02·√1.36
    (0.784, 1.19)
    """
    residual = np.asarray(residual, dtype=np.float64)
    return np.sqrt(np.maximum(1 - residual, 0)) * (1 - SLACK), np.sqrt(1 + residual) * (1 + SLACK)


def split_excess(
    stored: NDArray[np.floating], index: NDArray[np.integer], schedules: Sequence[NsSchedule], ranks: NDArray[np.integer]
) -> tuple[Floats, Floats]:
    """Predicted a² − 1 = mean(o² − 1), split into values with o < 0.5 and the rest; each of shape (records, matrices).

    Args:
        stored: recorded singular values, shape (records, matrices, 64).
        index: which of `schedules` was in force, shape (records, matrices); −1: none. Missing where it scales otherwise than by ‖M‖_F:
            the singular values are not of what its iteration started from.
        ranks: of every matrix.
    """
    of_frobenius = [(i, schedule) for i, schedule in enumerate(schedules) if schedule.scaling == "frobenius"]
    low, band = np.full(index.shape, np.nan), np.full(index.shape, np.nan)
    for pairs, x in read_back(stored, ranks):
        for i, schedule in of_frobenius:
            own = index.ravel()[pairs] == i
            if own.any():
                o = ns_map(x[own], schedule.coefficients)
                excess, under = o * o - 1, o < UNDER_LIFTED
                low.ravel()[pairs[own]] = np.where(under, excess, 0).mean(axis=-1)
                band.ravel()[pairs[own]] = np.where(under, 0, excess).mean(axis=-1)
    return low, band
