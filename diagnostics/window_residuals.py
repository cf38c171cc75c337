"""What every schedule on offer would leave of the spectra of a window, and how much of it bfloat16 could do anything about.

Muon iterates in bfloat16. Singular values x below the rounding noise of the cast, φ = 0.425·2⁻⁸(1/√m + 1/√n), are noise: steps
spent on them turn it, not the momentum, into an orthogonal matrix. A residual over the recoverable values, x_i ≥ φ, leaves them out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .ns_families import Coefficients
from .recorded_spectra import RecordedSpectra, outputs_under, read_back
from .spectrum import BFLOAT16_ROUNDOFF, precision_floor

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WindowResiduals:
    """Squared Gram residuals ε̃² = mean_i (1 − o_i²)² of every spectrum under every schedule, NaN where none was recorded.

    Attributes:
        square: ε̃², shape (schedules, records, matrices).
        square_recoverable: the part of it that the values x_i ≥ φ make up, (1/r)Σ over them; same shape.
        recoverable: the share of singular values with x_i ≥ φ, shape (records, matrices). Since Σx² = 1 and φ < 1/√r, the
            largest is always one of them; only a spectrum of zeros has none, and counts as not recorded where they are left out.
    """

    square: Floats
    square_recoverable: Floats
    recoverable: Floats

    def residual(self, *, recoverable: bool = False) -> Floats:
        """ε̃ over all singular values, or over the recoverable ones alone; shape (schedules, records, matrices)."""
        if not recoverable:
            return np.sqrt(self.square)
        return np.sqrt(self.square_recoverable / np.where(self.recoverable > 0, self.recoverable, np.nan))


def window_residuals(spectra: RecordedSpectra, schedules: Sequence[Coefficients]) -> WindowResiduals:
    """Of every spectrum under each of `schedules`."""
    shape = spectra.stored.shape[:2]
    square = np.full((2, len(schedules), *shape), np.nan)
    share = np.full(shape, np.nan)
    flat, flat_share = square.reshape(2, len(schedules), -1), share.reshape(-1)
    floor = np.array([precision_floor(m, n, BFLOAT16_ROUNDOFF) for m, n in zip(spectra.rows.tolist(), spectra.cols.tolist(), strict=True)])
    for pairs, x in read_back(spectra.stored, spectra.ranks):
        above = (x >= floor[pairs % shape[1], None]).astype(np.float64)
        flat_share[pairs] = np.where(np.isfinite(x).all(axis=-1), above.mean(axis=-1), np.nan)
        for i, o in outputs_under(x, schedules):
            # A schedule that escapes ends in inf and nan; that is its true result.
            with np.errstate(over="ignore", invalid="ignore"):
                terms = (1 - o * o) ** 2
                flat[0, i, pairs] = terms.mean(axis=-1)
                flat[1, i, pairs] = np.where(above > 0, terms, 0).mean(axis=-1)
    flat[1][:, np.isnan(flat_share)] = np.nan
    return WindowResiduals(square[0], square[1], share)
