"""What the records of a window say about every operator: all that a schedule is chosen by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .allocation import Problem
from .recorded_spectra import RecordedSpectra
from .window_residuals import WindowResiduals

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """Spectra of a window, what each schedule on offer would leave of them, and the allocation problem they pose.

    Attributes:
        spectra: of the matrices that were seen.
        members: operator → which of those matrices are its own, shape (matrices,).
        matrices: operator → the names of all its matrices, seen or not.
        seen: what each schedule on offer leaves of each spectrum.
        given: the operators' mean residuals, costs and weights.
        family, recoverable: whose coefficients, and over which singular values the residuals are.
    """

    spectra: RecordedSpectra
    members: Mapping[str, NDArray[np.bool_]]
    matrices: Mapping[str, tuple[str, ...]]
    seen: WindowResiduals
    given: Problem
    family: str
    recoverable: bool

    def under(self, steps: Sequence[int], values: Floats) -> Floats:
        """Of `values` (schedules, records, matrices) those under each operator's own steps, shape (records, matrices)."""
        chosen = np.zeros(values.shape[-1], np.int64)
        for own, k in zip(self.members.values(), steps, strict=True):
            chosen[own] = self.given.steps.index(k)
        return np.asarray(values[chosen, :, np.arange(values.shape[-1])].T)

    def means(self, values: Floats) -> Floats:
        """Of values (records, matrices) the mean over each operator's, shape (operators,); NaN where there are none."""
        return np.array([known_mean(values[:, own]) for own in self.members.values()])


def known_mean(values: Floats) -> float:
    """Mean of the finite ones; NaN where there are none."""
    known = np.isfinite(values)
    return float(values[known].mean()) if known.any() else float("nan")
