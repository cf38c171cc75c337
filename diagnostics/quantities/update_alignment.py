"""How large an update is beside its target, and how much of the difference the Newton–Schulz iteration explains.

With ΔW = −η·s·O and O of rank r = min(m, n), a = RMS(ΔW/η)/(s/√max(m, n)) satisfies a² = mean_i o_i² for every scaling s. Source:
AdaMuon Eq. 9–10, Moonlight (arXiv 2502.16982).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..catalogue import READABLE_NOISE
from ..newton_schulz.families import Coefficients
from ..newton_schulz.hazards import output_band
from ..newton_schulz.recorded_spectra import NsSchedule, read_back, residual_in_force
from ..newton_schulz.spectral_map import ns_map

Floats = NDArray[np.float64]

# o below this is counted as under-lifted: an NS budget problem; the rest of a² − 1 is the coefficients' band.
UNDER_LIFTED = 0.5
# How far a may lie outside a bound: reading ΔW and bfloat16 arithmetic each move it by under 1 %.
SLACK = 0.02


class Size(NamedTuple):
    """Update size of a matrix, or the medians over those of a parameter group.

    Attributes:
        a: RMS of the update per learning rate over its target.
        low, high: tolerance.
        least, most: what the Gram residual of the steps in force can explain; outside, a scale is wrong.
        expected: a that the spectrum predicts; 1 where more than a scale follows the iteration, or that is not known.
        under_lifted: part of a² − 1 from singular values left under 0.5; NaN where not known.
    """

    a: float
    low: float
    high: float
    least: float
    most: float
    expected: float
    under_lifted: float


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


def band_of(coefficients: Coefficients) -> tuple[float, float]:
    """Least and largest a that coefficients make where they lift every direction: their output band from x = 0.01 on, and 1, each end 2 % wider.

    What is under-lifted lowers a beyond it; a narrower interval is usual for a spectrum without very small values.

    >>> low, high = band_of(((3.4445, -4.7750, 2.0315),) * 5)  # band 0.682 to 1.134
    >>> round(low, 3), round(high, 3)
    (0.668, 1.157)
    """
    low, high = output_band(coefficients)
    return max(min(low, 1.0), 0.0) * (1 - SLACK), max(-low, high, 1.0) * (1 + SLACK)


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


def update_sizes(
    update: Mapping[str, NDArray[Any]],
    geometry: Mapping[str, NDArray[Any]],
    schedules: Sequence[NsSchedule],
    ranks: NDArray[np.integer],
    target: float | None = None,
    tolerance: tuple[float, float] | None = None,
) -> Floats:
    """The seven numbers of :class:`Size` of each matrix of one record; NaN where an update is not orthogonalised or cannot be read. Shape (matrices, 7).

    Args:
        update, geometry: quantities of the groups of these names, of shape (matrices, …), the matrices being the same.
        schedules: what `ns_schedule` holds indices into.
        ranks: of every matrix.
        target: in the place of the recorded `update_rms_target`, where there is one.
        tolerance: in the place of :func:`band_of` the coefficients in force. Rounding noise of the weights widens either.
    """
    meant, intended = update["update_rms_target"], update["update_rms_intended"]
    index, stored = geometry["ns_schedule"][None], geometry["sigma_quantile"][None]
    residual = residual_in_force(geometry["ns_residual"][None], index, schedules, stored, ranks)[0]
    under, band = (part[0] for part in split_excess(stored, index, schedules, ranks))
    bands = np.array([tolerance or band_of(schedule.coefficients) for schedule in schedules] or [(np.nan, np.nan)])
    with np.errstate(invalid="ignore", divide="ignore"):
        size = known_size(update["update_rms_per_lr"], intended)
        size[~((size > 0) & is_readable(update["update_noise"], intended))] = np.nan
        a = size / (meant if target is None else np.where(np.isfinite(meant), target, np.nan))
        low, high = np.where(index[0] >= 0, bands[index[0]].T, np.nan)
        noise = np.where(np.isfinite(intended), 0, update["update_noise"])
        square = np.where(np.isfinite(geometry["ns_residual_achieved"]), 1 + under + band, 1)
        expected = np.sqrt(np.where(np.isfinite(square) & (square > 0), square, 1))
    return np.stack([a, low * (1 - noise), high * (1 + noise), *explained(residual), expected, under], axis=-1)
