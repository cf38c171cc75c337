"""The problem that Newton–Schulz is given: a matrix, the format it is kept in, and how the optimizer iterates on it.

It can be had without a step: from a checkpoint, or of a matrix whose pieces were gathered from several processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..catalogue import NS_STEPS
from ..newton_schulz.aol import aol_start
from ..newton_schulz.families import Coefficients, repeat_last
from ..newton_schulz.matrix_iteration import orthogonalised
from ..newton_schulz.spectral_map import residual_curves
from ..spectra.spectrum import BFLOAT16_ROUNDOFF, Spectrum, largest_magnitude, precision_floor, spectrum
from ..spectra.spectrum_sketch import sketch
from .measured import Measured, quietly
from .update_size import rms

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NewtonSchulz:
    """How an optimizer orthogonalises: X₀, then one step per triple.

    Attributes:
        scaling: "frobenius": X₀ = M/max(‖M‖_F, eps); "aol": X₀ = diag(d)·M, row sums of |MMᵀ| at least eps (see :mod:`..newton_schulz.aol`).
    """

    coefficients: Coefficients
    eps: float
    scaling: Literal["frobenius", "aol"] = "frobenius"

    def repeated(self, steps: int) -> Coefficients:
        """Its first `steps` triples, the last one repeated; an optimizer set to zero steps has none to apply, and stays at X₀."""
        return repeat_last(self.coefficients, steps) if self.coefficients else ((1.0, 0.0, 0.0),) * steps


@dataclass(frozen=True)
class Problem:
    """A matrix M, shape (rows, cols), that is orthogonalised, or would be.

    Attributes:
        matrix: M: the exact NS input, or momentum or gradient where the optimizer does not orthogonalise.
        roundoff: unit roundoff of the format M is stored in.
        gram: as :func:`..spectra.spectrum.spectrum` takes it, of M; None where that is to make it itself.
        newton_schulz: None where the optimizer does not orthogonalise.
    """

    matrix: NDArray[np.floating]
    roundoff: float = 0.0
    gram: Floats | None = None
    newton_schulz: NewtonSchulz | None = None

    @cached_property
    def spectrum(self) -> Spectrum | None:
        """Of M; None where it is zero, or not finite."""
        if not np.isfinite(largest := largest_magnitude(self.matrix)) or largest == 0:
            return None
        return spectrum(self.matrix, unit_roundoff=self.roundoff, gram=self.gram)

    def replayed(self) -> NDArray[np.floating]:
        """O of the optimizer's own schedule run once more, in float32."""
        assert self.newton_schulz is not None
        return orthogonalised(self.matrix, self.newton_schulz.coefficients, self.newton_schulz.eps, self.newton_schulz.scaling)

    def part(self, axis: int, indices: NDArray[np.int64]) -> "Problem":
        """Some rows (axis 0) or columns (axis 1), which the optimizer did not see as a matrix of their own."""
        return Problem(np.asarray(self.matrix.take(indices, axis)), self.roundoff)


def joined_problem(problems: Sequence[Problem]) -> Problem:
    """That of the matrix [M_1 … M_K], which an optimizer orthogonalises as one; settings are those of the first."""
    first = problems[0]
    return Problem(np.hstack([one.matrix for one in problems]), first.roundoff, None, first.newton_schulz)


@quietly
def measure_problem(problem: Problem) -> Measured:
    """The quantities of the group `geometry` that no step is needed for: M's spectrum, and the residuals that the iteration leaves of it.

    Only `fro_norm` where M is zero or not finite.
    """
    found = problem.spectrum
    if found is None:
        return {"fro_norm": rms(problem.matrix) * float(np.sqrt(problem.matrix.size))}
    rows, cols = problem.matrix.shape
    measured: Measured = {
        "sigma_quantile": sketch(found.normalised),
        "fro_norm": found.fro_norm,
        "condition_number": found.condition_number,
        "condition_is_floor": found.condition_is_floor,
        "stable_rank": found.stable_rank,
        "below_floor": found.below_floor,
        "recoverable_share": float(np.mean(found.normalised >= precision_floor(rows, cols, BFLOAT16_ROUNDOFF))),
    }
    if problem.newton_schulz is not None:
        x, cosines = _start(problem.matrix, found, problem.newton_schulz)
        measured["ns_residual"], measured["ns_residual_polar"] = residual_curves(x, problem.newton_schulz.repeated(NS_STEPS), cosines)
    return measured


def _start(matrix: NDArray[np.floating], found: Spectrum, newton_schulz: NewtonSchulz) -> tuple[Floats, Floats | float]:
    """Singular values of X₀, and the cosines that :func:`polar_residual` takes."""
    if newton_schulz.scaling == "aol":
        start = aol_start(matrix, newton_schulz.eps)
        return start.x, start.cosines
    return found.sigma / max(found.fro_norm, newton_schulz.eps), 1.0
