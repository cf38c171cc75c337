"""The rotation that an adaptively rotated optimizer keeps (ARO, arXiv 2602.09006): how far it turned, and what it gains.

R_t is orthogonal, r×r, of the matrix' shorter side; the update is R f(RᵀM), f the optimizer's own elementwise or row rule.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rotation:
    """What a step did with its rotation; matrices as the optimizer sees them, their shorter side first.

    Attributes:
        before, after: R_{t−1} and R_t, shape (r, r).
        momentum: M, what is rotated, shape (r, q).
        plain, rotated: f(M) and R_t f(R_tᵀM).
    """

    before: NDArray[np.floating]
    after: NDArray[np.floating]
    momentum: NDArray[np.floating]
    plain: NDArray[np.floating]
    rotated: NDArray[np.floating]


def rotation_drift(rotation: Rotation) -> float:
    """1 − Σ_i (R_tᵀR_{t−1})_ii²/r, from 0 to 1. Blind to the sign of an axis, which the update does not depend on.

    >>> still, swapped = np.eye(2), np.eye(2)[::-1]
    >>> [rotation_drift(Rotation(still, after, *[still] * 3)) for after in (still, -still, swapped)]
    [0.0, 0.0, 1.0]
    """
    diagonal = np.einsum("ji,ji->i", rotation.after, rotation.before, dtype=np.float64)
    return float(1 - np.mean(diagonal**2))


def rotation_gain(rotation: Rotation) -> float:
    """⟨M, R f(RᵀM)⟩/⟨M, f(M)⟩, f(M) scaled to the Frobenius norm of R f(RᵀM): the ratio of their cosines with M. Above 1: rotating helps."""
    momentum, plain, rotated = (np.asarray(x, np.float64) for x in (rotation.momentum, rotation.plain, rotation.rotated))
    scale = np.linalg.norm(rotated) / np.linalg.norm(plain)
    return float(np.vdot(momentum, rotated) / (scale * np.vdot(momentum, plain)))
