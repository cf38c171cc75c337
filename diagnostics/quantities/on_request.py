"""What is measured only where it was asked for: gradients, blocks of a matrix, pairs of layers, and the iteration in low precision."""

from math import log10

import numpy as np
from numpy.typing import NDArray

from ..catalogue import NS_STEPS
from ..newton_schulz.matrix_iteration import bfloat16_residuals
from ..spectra.spectrum import Spectrum, spectrum
from ..spectra.spectrum_sketch import sketch
from .layer_stacking import gram_distances, leading_vectors, stacked_conditions, subspace_overlap, subspace_size
from .measured import Measured, quietly
from .observation import Gradient, Observation
from .problem import Problem
from .update_size import rms
from .variance_reduction import cosine


@quietly
def measure_gradient(gradient: Gradient, problem: Problem | None) -> Measured:
    """The quantities of the group `gradient`, its cosine with the problem's matrix where there is one; only the norm where the gradient is zero or not finite."""
    measured = _spectrum_of(gradient.matrix, gradient.roundoff, "gradient")
    if problem is not None:
        measured["gradient_cosine"] = cosine(gradient.matrix, problem.matrix)
    return measured


@quietly
def measure_block(seen: Observation) -> Measured:
    """The quantities of the group `blocks`, of the observation of a block."""
    measured = {} if seen.problem is None else _spectrum_of(seen.problem.matrix, seen.problem.roundoff, "block")
    return measured if seen.step is None else {**measured, "block_update_rms_per_lr": seen.step.sizes.update}


@quietly
def measure_pair(first: Problem, second: Problem) -> Measured:
    """The quantities of the group `stacking`, of two problems of one shape; nothing where one has no spectrum."""
    spectra = first.spectrum, second.spectrum
    if spectra[0] is None or spectra[1] is None:
        return {}
    # Each at its own largest entry: products of tiny or huge numbers stay inside float64, and only a stack's κ asks for sizes.
    matrices = [np.ldexp(np.asarray(m, np.float64), -int(np.frexp(np.abs(m).max())[1])) for m in (first.matrix, second.matrix)]
    size = subspace_size((spectra[0], spectra[1]))
    vectors = [leading_vectors(matrix, size) for matrix in matrices]
    roundoff = max(first.roundoff, second.roundoff)
    stacked = np.array(stacked_conditions(first.matrix, second.matrix, roundoff))
    alone = max(s.condition_number for s in spectra if s is not None)
    return {
        "subspace_overlap": np.array([subspace_overlap(vectors[0][side], vectors[1][side]) for side in (0, 1)]),
        "subspace_overlap_null": size / np.array(first.matrix.shape, dtype=np.float64),
        "gram_distance": np.array(gram_distances(*matrices)),
        "stack_condition_number": stacked,
        "stack_condition_gain": log10(alone) - np.log10(stacked),
    }


@quietly
def measure_precision(problem: Problem) -> Measured:
    """The quantities of the group `precision`; nothing where the optimizer does not orthogonalise, or its input has no spectrum."""
    if problem.newton_schulz is None or problem.spectrum is None:
        return {}
    steps = problem.newton_schulz.repeated(NS_STEPS)
    gram, polar = bfloat16_residuals(problem.matrix, steps, problem.newton_schulz.eps, problem.newton_schulz.scaling)
    return {"ns_residual_bfloat16": gram, "ns_residual_polar_bfloat16": polar}


def _spectrum_of(matrix: NDArray[np.floating], unit_roundoff: float, prefix: str) -> Measured:
    """Norm and spectrum under names that begin with `prefix`."""
    fro_norm = rms(matrix) * float(np.sqrt(matrix.size))
    if not np.isfinite(fro_norm) or fro_norm == 0:
        return {f"{prefix}_fro_norm": fro_norm}
    found: Spectrum = spectrum(matrix, unit_roundoff=unit_roundoff)
    return {
        f"{prefix}_sigma_quantile": sketch(found.normalised),
        f"{prefix}_fro_norm": found.fro_norm,
        f"{prefix}_condition_number": found.condition_number,
        f"{prefix}_condition_is_floor": found.condition_is_floor,
        f"{prefix}_stable_rank": found.stable_rank,
    }
