"""What is measured only where it was asked for: gradients, blocks of a matrix, pairs of layers, and the iteration in low precision."""

from math import log10

import numpy as np
from numpy.typing import NDArray

from ..catalogue import NS_STEPS
from ..newton_schulz.matrix_iteration import bfloat16_residuals
from ..spectra.spectrum import Spectrum, spectrum
from ..spectra.spectrum_sketch import sketch
from .layer_stacking import gram_distances, leading_vectors, stacked_conditions, subspace_overlap, subspace_size
from .observation import Measured, Observation, quietly
from .update_size import rms
from .variance_reduction import cosine


@quietly
def measure_gradient(seen: Observation) -> Measured:
    """The quantities of the group `gradient`; only the norm where the gradient is zero or not finite."""
    if seen.gradient is None:
        return {}
    measured = _spectrum_of(seen.gradient, seen.gradient_roundoff, "gradient")
    if seen.ns_input is not None:
        measured["gradient_cosine"] = cosine(seen.gradient, seen.ns_input)
    return measured


@quietly
def measure_block(seen: Observation) -> Measured:
    """The quantities of the group `blocks`, of the observation of a block."""
    measured = {} if seen.ns_input is None else _spectrum_of(seen.ns_input, seen.ns_roundoff, "block")
    return {**measured, "block_update_rms_per_lr": seen.sizes.update}


@quietly
def measure_pair(first: Observation, second: Observation) -> Measured:
    """The quantities of the group `stacking`, of two observations of one shape; nothing where one has no spectrum."""
    spectra = first.spectrum, second.spectrum
    if spectra[0] is None or spectra[1] is None:
        return {}
    assert first.ns_input is not None
    assert second.ns_input is not None
    # Each at its own largest entry: products of tiny or huge numbers stay inside float64, and only a stack's κ asks for sizes.
    matrices = [np.ldexp(np.asarray(m, np.float64), -int(np.frexp(np.abs(m).max())[1])) for m in (first.ns_input, second.ns_input)]
    size = subspace_size((spectra[0], spectra[1]))
    vectors = [leading_vectors(matrix, size) for matrix in matrices]
    roundoff = max(first.ns_roundoff, second.ns_roundoff)
    stacked = np.array(stacked_conditions(first.ns_input, second.ns_input, roundoff))
    alone = max(s.condition_number for s in spectra if s is not None)
    return {
        "subspace_overlap": np.array([subspace_overlap(vectors[0][side], vectors[1][side]) for side in (0, 1)]),
        "subspace_overlap_null": size / np.array(first.ns_input.shape, dtype=np.float64),
        "gram_distance": np.array(gram_distances(*matrices)),
        "stack_condition_number": stacked,
        "stack_condition_gain": log10(alone) - np.log10(stacked),
    }


@quietly
def measure_precision(seen: Observation) -> Measured:
    """The quantities of the group `precision`; nothing where the optimizer does not orthogonalise, or its input has no spectrum."""
    if seen.newton_schulz is None or seen.ns_input is None or seen.spectrum is None:
        return {}
    steps = seen.newton_schulz.repeated(NS_STEPS)
    gram, polar = bfloat16_residuals(seen.ns_input, steps, seen.newton_schulz.eps, seen.newton_schulz.scaling)
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
