"""What was seen of one matrix at one step: the problem that Newton–Schulz was given, the step that was taken, what was kept beside them.

Each part may be there without the others, and what is measured on a part needs that part alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..newton_schulz.spectral_map import achieved_residual, alignment
from .measured import Measured, quietly
from .moments import Moments
from .output_dispersion import row_dispersion
from .problem import Problem, joined_problem, measure_problem
from .rotation import Rotation, rotation_drift, rotation_gain
from .step_taken import StepTaken, joined_step
from .variance_reduction import cosine, variance_ratio


@dataclass(frozen=True)
class Gradient:
    """A gradient G, shape (rows, cols).

    Attributes:
        matrix: G.
        roundoff: unit roundoff of the format G is stored in.
        corrected: the variance-reduced gradient that was averaged in the place of G.
    """

    matrix: NDArray[np.floating]
    roundoff: float = 0.0
    corrected: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Observation:
    """What one optimizer step saw and did to one matrix.

    Attributes:
        problem: None where no spectrum is to be measured.
        step: None where there was none: a checkpoint's matrix.
        moments: first and second moment as kept; None where there is no second one.
        gradient: None where nothing that was asked for needs it.
        rotation: what the step did with the rotation that the optimizer keeps.
    """

    problem: Problem | None = None
    step: StepTaken | None = None
    moments: Moments | None = None
    gradient: Gradient | None = None
    rotation: Rotation | None = None

    def part(self, axis: int, indices: NDArray[np.int64]) -> "Observation":
        """That of some rows (axis 0) or columns (axis 1), which the optimizer did not see as a matrix of their own."""
        return Observation(self.problem and self.problem.part(axis, indices), self.step and self.step.part(axis, indices))


def side_by_side(seen: Sequence[Observation]) -> Observation:
    """One observation of the matrix [M_1 … M_K], which an optimizer orthogonalises as one; settings are those of the first."""
    problems, steps, gradients = ([getattr(one, name) for one in seen] for name in ("problem", "step", "gradient"))
    return Observation(
        None if None in problems else joined_problem(problems),
        None if None in steps else joined_step(steps),
        gradient=None if None in gradients else Gradient(np.hstack([one.matrix for one in gradients]), gradients[0].roundoff),
    )


@quietly
def measure_geometry(seen: Observation) -> Measured:
    """The quantities of the group `geometry` but `ns_schedule`: those of the problem, and what the step made of it; only `fro_norm` where M has no spectrum."""
    problem = seen.problem
    assert problem is not None
    measured = measure_problem(problem)
    if problem.spectrum is None:
        return measured
    if seen.rotation is not None:
        measured["rotation_drift"], measured["rotation_gain"] = rotation_drift(seen.rotation), rotation_gain(seen.rotation)
    if problem.newton_schulz is not None:
        output = None if seen.step is None else seen.step.output
        if output is not None:
            measured["ns_residual_achieved"] = achieved_residual(output)
            measured["alignment"] = alignment(problem.matrix, output, problem.spectrum.nuclear_norm)
        else:
            output = problem.replayed()
        measured["row_dispersion"], measured["column_dispersion"] = row_dispersion(output), row_dispersion(output.T)
    return measured


@quietly
def measure_correction(gradient: Gradient) -> Measured:
    """The quantities of the group `update` that compare the corrected gradient with the gradient; none where nothing was corrected."""
    if gradient.corrected is None:
        return {}
    return {
        "correction_variance_ratio": variance_ratio(gradient.corrected, gradient.matrix),
        "correction_cosine": cosine(gradient.corrected, gradient.matrix),
    }
