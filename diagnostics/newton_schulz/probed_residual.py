"""The Gram residual of a matrix from a few random probes, where ‖I − OOᵀ‖_F itself would cost a product of the short side's cube."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PROBES = 8


class ProbedResidual(NamedTuple):
    """ε̃ as probes estimate it, and the standard error of that."""

    residual: float
    error: float


def probed_residual(output: NDArray[np.floating], probes: int = PROBES, seed: int = 0) -> ProbedResidual:
    """ε̃ = ‖I_r − OOᵀ‖_F/√r by √(mean over probes of ‖(I − OOᵀ)z‖²/r), z of independent signs ±1; 4rq FLOPs per probe.

    E‖Rz‖² = ‖R‖_F², so the square is unbiased for ε̃²; its root is low by half the relative variance. The error is that of the mean
    between the probes, propagated to the root: error(ε̃²)/(2ε̃).

    Args:
        output: O, shape (m, n), finite; products in its own precision.
        probes: at least 2.
        seed: of the probes' own generator.

    Raises:
        ValueError: fewer than 2 probes.

    >>> probed_residual(np.array([[0.5, 0.0], [0.0, 0.5]]))  # R is diagonal: signs see it exactly
    ProbedResidual(residual=0.75, error=0.0)
    """
    if probes < 2:
        raise ValueError(f"probes: expected at least 2, which tell their own error, got {probes}")
    o = output if output.shape[0] <= output.shape[1] else output.T
    r = o.shape[0]
    z = np.random.default_rng(seed).choice([-1.0, 1.0], size=(r, probes)).astype(o.dtype)
    squares = np.sum((z - o @ (o.T @ z)).astype(np.float64) ** 2, axis=0) / r
    residual = math.sqrt(squares.mean())
    error = float(squares.std(ddof=1)) / math.sqrt(probes)
    return ProbedResidual(residual, error / (2 * residual) if residual else 0.0)
