"""Whether two layers' matrices are better orthogonalised as one: TEON's stacking (arXiv 2601.23261), before it is tried.

Stacked side by side, [M_1 M_2], matrices share left singular vectors (TEON's mode 1); stacked one over the other, right ones. Where
the layers' Gram matrices agree, stacking does what each layer's own orthogonalisation does, but for 1/√2; it is worth its name
where leading subspaces overlap well beyond chance and the stack is better conditioned than its parts.
"""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from ..spectra.spectrum import Spectrum, spectrum

Floats = NDArray[np.float64]


def leading_vectors(matrix: NDArray[np.floating], count: int) -> tuple[Floats, Floats]:
    """The `count` leading left and right singular vectors, shapes (m, count) and (n, count).

    From the eigenvectors of the Gram matrix on the short side, whose error is u·σ_1²/gap in σ²: no matter for leading ones.
    """
    short = np.asarray(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T, dtype=np.float64)
    values, vectors = np.linalg.eigh(short @ short.T)
    of_short = vectors[:, ::-1][:, :count]
    of_long = short.T @ of_short / np.sqrt(values[::-1][:count].clip(min=np.finfo(np.float64).tiny))
    return (of_short, of_long) if matrix.shape[0] <= matrix.shape[1] else (of_long, of_short)


def subspace_overlap(first: Floats, second: Floats) -> float:
    """‖U_1ᵀU_2‖_F²/q, the mean squared cosine of the principal angles, for orthonormal U_k of shape (n, q).

    1 for equal subspaces, 0 for orthogonal ones, q/n on average for random ones.

    >>> subspace_overlap(np.eye(4)[:, :2], np.eye(4)[:, 1:3])
    0.5
    """
    return float(np.linalg.norm(first.T @ second) ** 2 / first.shape[1])


def gram_distances(first: NDArray[np.floating], second: NDArray[np.floating]) -> tuple[float, float]:
    """‖A_1 − A_2‖_F/2 with A_k = M_kM_kᵀ/tr, and with A_k = M_kᵀM_k/tr: each one's distance from the mean of both. From 0 to √½.

    On the long side without forming the large matrices, by ⟨M_1ᵀM_1, M_2ᵀM_2⟩ = ‖M_1M_2ᵀ‖_F², which cancels to about 1e-8.
    """
    a, b = (np.asarray(m, np.float64) / np.linalg.norm(m) for m in (first, second))
    tall = a.shape[0] > a.shape[1]
    a, b = (a.T, b.T) if tall else (a, b)
    grams = a @ a.T, b @ b.T
    on_short = float(np.linalg.norm(grams[0] - grams[1])) / 2
    squares = float(np.linalg.norm(grams[0]) ** 2 + np.linalg.norm(grams[1]) ** 2)
    on_long = float(np.sqrt(max(squares - 2 * float(np.linalg.norm(a @ b.T) ** 2), 0.0))) / 2
    return (on_long, on_short) if tall else (on_short, on_long)


def stacked_conditions(first: NDArray[np.floating], second: NDArray[np.floating], unit_roundoff: float) -> tuple[float, float]:
    """κ of [M_1 M_2] and of M_1 over M_2, lower bounds where the format carries no more (see :mod:`..spectra.spectrum`)."""
    side_by_side = spectrum(np.hstack([first, second]), unit_roundoff=unit_roundoff)
    one_over_the_other = spectrum(np.vstack([first, second]), unit_roundoff=unit_roundoff)
    return side_by_side.condition_number, one_over_the_other.condition_number


def subspace_size(spectra: tuple[Spectrum, Spectrum]) -> int:
    """q: the larger stable rank, rounded up, and no more than there are singular values."""
    return min(ceil(max(s.stable_rank for s in spectra) - 1e-9), len(spectra[0].sigma))
