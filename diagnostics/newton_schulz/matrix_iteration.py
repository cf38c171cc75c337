"""The Newton–Schulz iteration run on a matrix M = UΣVᵀ, in float32 or rounded to bfloat16 as an accelerator rounds it, and the exact polar
factor Q = UVᵀ that it should approach.

Elsewhere residuals follow from singular values alone (:mod:`.spectral_map`). Low precision adds what scalars cannot say: rounding
turns singular vectors, so that further steps orthogonalise the noise of the cast, and the Gram residual falls while the direction
does not improve. The emulated arithmetic is that of bfloat16 matrix units: numbers of 8 bits, products summed in float32, the sum
aX + (bA + cA²)X rounded once per product.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..spectra.spectrum import GRAM_CONDITION_LIMIT
from .aol import aol_scaled
from .families import Coefficients

Floats: TypeAlias = NDArray[np.float64]
Single: TypeAlias = NDArray[np.float32]
Matrix: TypeAlias = NDArray[Any]  # of float32 or float64


def to_bfloat16(array: NDArray[np.floating]) -> Single:
    """Every number rounded to the nearest of bfloat16, ties to even, as float32.

    By bits: bfloat16 is the upper half of float32, so half a unit less one, plus the lowest bit kept, is added and the lower half cut
    off. What is too large becomes infinite; NaN stays.

    >>> to_bfloat16(np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])).tolist()  # ties go to even, the rest to the nearest
    [1.0, 1.015625, 1.0078125]
    """
    single = np.ascontiguousarray(array, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(single), single, rounded)


def iterates(
    start: Matrix, coefficients: Coefficients, rounded: Callable[[Matrix], Matrix] = lambda x: x
) -> Iterator[tuple[Matrix, Matrix]]:
    """X_0, X_1, … after each of `coefficients`, every one with its Gram matrix XXᵀ before that is rounded; in the precision of `start`.

    `start` has its shorter side first. `rounded` is applied to X_0 and to what every product gives.
    """
    x = rounded(start)
    for triple in (*coefficients, None):
        gram = x @ x.T
        yield x, gram
        if triple is not None:
            a, b, c = triple
            gram = rounded(gram)
            x = rounded(a * x + rounded(b * gram + c * (gram @ gram)) @ x)


def start_of(matrix: NDArray[np.floating], eps: float, scaling: str, rounded: Callable[[Single], Single] = lambda x: x) -> Single:
    """X₀ with its shorter side first: M/max(‖M‖_F, eps), or diag(d)·M where `scaling` is "aol" (see :mod:`.aol`).

    Rounded as torch's Muon rounds it: M, its norm, and the quotient. The almost-orthogonal scaling is computed in float64 and rounded once.
    """
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if scaling == "aol":
        return rounded(aol_scaled(short, eps).astype(np.float32))
    x = rounded(np.asarray(short, dtype=np.float32))
    norm = rounded(np.array(np.linalg.norm(x.astype(np.float64)), dtype=np.float32))
    return rounded((x / np.maximum(norm, eps)).astype(np.float32))


def orthogonalised(matrix: NDArray[np.floating], coefficients: Coefficients, eps: float, scaling: str = "frobenius") -> Single:
    """O of the whole iteration in float32, shape of `matrix`: the optimizer's own, but for the rounding of its format."""
    for x, _ in iterates(start_of(matrix, eps, scaling), coefficients):
        output = x
    return output if matrix.shape[0] <= matrix.shape[1] else output.T


def bfloat16_residuals(
    matrix: NDArray[np.floating], coefficients: Coefficients, eps: float, scaling: str = "frobenius"
) -> tuple[Floats, Floats]:
    """Gram and polar residual of the bfloat16 iteration after 0, 1, …, len(coefficients) steps, the polar one against the exact factor of M.

    `matrix` is finite and not zero. The residuals themselves are computed in float32 of the rounded iterates: right to 1e-5.
    """
    exact = polar_factor(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).astype(np.float32)
    rank = len(exact)
    identity = np.eye(rank, dtype=np.float32)
    curves = [
        (np.linalg.norm(identity - gram), np.linalg.norm(x - exact))
        for x, gram in iterates(start_of(matrix, eps, scaling, to_bfloat16), coefficients, to_bfloat16)
    ]
    gram_curve, polar_curve = np.asarray(curves, dtype=np.float64).T / np.sqrt(rank)
    return gram_curve, polar_curve


def polar_factor(matrix: NDArray[np.floating]) -> Floats:
    """UVᵀ in float64, shape (m, n), the matrix finite and not zero.

    By (MMᵀ)^(−1/2)·M from the eigenvectors of the Gram matrix on the short side, a quarter of an SVD's time; from an SVD where that
    loses the smallest singular values (κ > 2e5; below it was right to 1e-5 of ‖Q‖_F). In the null space of M, where no polar
    factor is defined, it is any that an SVD gives.

    >>> polar_factor(np.array([[3.0, 0.0], [0.0, -4.0]])).round(12).tolist()
    [[1.0, 0.0], [0.0, -1.0]]
    """
    short = np.asarray(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T, dtype=np.float64)
    # As in `spectrum`, a power of two keeps squares inside float64 and rounds nothing.
    short = np.ldexp(short, -int(np.frexp(np.abs(short).max())[1]))
    values, u = np.linalg.eigh(short @ short.T)
    if values[0] * GRAM_CONDITION_LIMIT**2 > values[-1]:
        factor = u @ ((u.T @ short) / np.sqrt(values)[:, None])
    else:
        left, _, right = np.linalg.svd(short, full_matrices=False)
        factor = left @ right
    return np.asarray(factor if matrix.shape[0] <= matrix.shape[1] else factor.T)
