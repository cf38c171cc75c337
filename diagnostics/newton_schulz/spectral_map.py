"""What a Newton–Schulz (NS) schedule does to a spectrum: NS acts on singular values alone, so scalars suffice.

X₀ = M/‖M‖_F; A = XXᵀ; X ← aX + (bA + cA²)X maps every singular value by p(x) = a·x + b·x³ + c·x⁵ and leaves the
singular vectors alone. O denotes the output, o_i its singular values, Q = UVᵀ the exact polar factor, r = min(m, n).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .families import Coefficients

Floats = NDArray[np.float64]


def ns_map(x: ArrayLike, coefficients: Coefficients) -> Floats:
    """Singular values after all of `coefficients`, from normalised singular values x = σ/‖M‖_F (any shape).

    >>> round(float(ns_map(0.1, ((3.4445, -4.7750, 2.0315),) * 5)), 5)
    0.71212
    """
    o = np.asarray(x, dtype=np.float64)
    # A schedule that escapes ends in inf and nan; that is its true result.
    with np.errstate(over="ignore", invalid="ignore"):
        for a, b, c in coefficients:
            # o(a + o²(b + o²c)) in two arrays: what fits a processor's cache is a fifth faster.
            square = o * o
            grown = square * c
            grown += b
            grown *= square
            grown += a
            grown *= o
            o = grown
    return o


def gram_residual(o: ArrayLike) -> Floats:
    """Shape-normalised Gram residual ε̃ = ‖I_r − OOᵀ‖_F/√r = √(mean_i (1 − o_i²)²), over the last axis. Dimensionless."""
    o = np.asarray(o, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(np.mean((1 - o * o) ** 2, axis=-1)))


def polar_residual(o: ArrayLike, cosines: ArrayLike = 1.0) -> Floats:
    """Polar residual ‖O − Q‖_F/√r = √(mean_i ((o_i − c_i)² + 1 − c_i²)), over the last axis. Dimensionless.

    c_i = u_iᵀ·Q·v_i, u_i and v_i being O's singular vectors. They are 1 when O shares the singular vectors of M, as it does in
    exact arithmetic unless M was scaled unequally before the iteration; the residual is then √(mean_i (1 − o_i)²).
    """
    o, c = np.asarray(o, dtype=np.float64), np.asarray(cosines, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(np.mean((o - c) ** 2 + (1 - c * c), axis=-1)))


def residual_curves(x: ArrayLike, coefficients: Coefficients, cosines: ArrayLike = 1.0) -> tuple[Floats, Floats]:
    """Gram and polar residual after 0, 1, …, len(coefficients) steps, from normalised singular values of shape (r,)."""
    after = [np.asarray(x, dtype=np.float64)]
    for triple in coefficients:
        after.append(ns_map(after[-1], (triple,)))
    stacked = np.stack(after)
    return gram_residual(stacked), polar_residual(stacked, cosines)


def achieved_residual(output: NDArray[np.floating]) -> float:
    """Gram residual ‖I_r − OOᵀ‖_F/√r of a matrix as it is, shape (m, n), the Gram matrix on the short side, in the format of O.

    In float32 right to 4e-7 (measured up to 1024 × 3072, of an exact polar factor): what float32 weights leave of an update that is read
    back from them is 2 to 3 times that. At residuals of practice the relative error was 2e-8.
    """
    o = output if output.shape[0] <= output.shape[1] else output.T
    gram = o @ o.T
    gram.flat[:: len(gram) + 1] -= 1
    flat = gram.ravel().astype(np.float64)
    return float(np.sqrt(flat @ flat / len(gram)))


def alignment(ns_input: NDArray[np.floating], output: NDArray[np.floating], nuclear_norm: float) -> float:
    """⟨M, O⟩/‖M‖_*: 1 exactly when O is the polar factor on the range of M. The residual is blind to direction, this is not.

    NaN for a zero matrix.
    """
    if nuclear_norm == 0:
        return float("nan")
    # Rows are summed in the matrices' own format, where that holds the products, and the rows in float64.
    wide = None if 1e-25 < nuclear_norm < 1e25 else np.float64
    return float(np.einsum("ij,ij->i", ns_input, output, dtype=wide).sum(dtype=np.float64) / nuclear_norm)


def ns_flops(rows: int, cols: int, *, cubic: bool = False) -> int:
    """FLOPs of one step, r and q the short and long side: 2(2r²q + r³), two products with X and one of Grams; cubic (c = 0) 4r²q, without it."""
    r, q = min(rows, cols), max(rows, cols)
    return 2 * (2 * r * r * q + (0 if cubic else r**3))
