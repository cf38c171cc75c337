"""The singular spectrum of a matrix: what is computed, to what accuracy, and where the input's own precision ends."""

from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Rounding n-bit numbers moves a Gaussian matrix by ‖E‖_F ≈ 0.425·u·‖M‖_F, u the unit roundoff (measured on bfloat16,
# u = 2⁻⁸: 0.00166; the mean over a binade of a uniform error, hence the same factor for every binary format).
ROUNDING_NOISE = 0.425
BFLOAT16_ROUNDOFF = 2.0**-8

# Above this κ the eigenvalues of a float64 Gram matrix lose σ_min: its error grows with κ² (where all values but the smallest
# are equal, the worst case, 3e-5 at κ = 2e5 and 7e-4 at 9e5 were measured).
GRAM_CONDITION_LIMIT = 2e5

# Binary exponents within which squares, and sums of them, stay inside float64: every float32 number is.
_SAFE_EXPONENT = 200


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix M and the figures that follow from them.

    Attributes:
        sigma: singular values, descending, float64, shape (r,).
        fro_norm: ‖M‖_F.
        floor: smallest x = σ/‖M‖_F that the precision of M's numbers carries (see :func:`precision_floor`).
    """

    sigma: Floats
    fro_norm: float
    floor: float

    @cached_property
    def normalised(self) -> Floats:
        """x_i = σ_i/‖M‖_F, descending: what the Newton–Schulz iteration sees. Σx² = 1."""
        return self.sigma / self.fro_norm

    @property
    def condition_is_floor(self) -> bool:
        """True where σ_min lies under the floor: κ is then at least `condition_number`, and nothing more is known.

        That is the κ of M as stored. Of the matrix that was rounded to M, κ is at least about half as much (Weyl).
        """
        return bool(self.normalised[-1] < self.floor)

    @property
    def condition_number(self) -> float:
        """κ = σ_1/σ_r; σ_1/(floor·‖M‖_F), a lower bound, where `condition_is_floor`."""
        return float(self.normalised[0] / max(self.normalised[-1], self.floor))

    @property
    def stable_rank(self) -> float:
        """‖M‖_F²/σ_1², between 1 and r."""
        return float(1 / self.normalised[0] ** 2)

    @property
    def nuclear_norm(self) -> float:
        """‖M‖_* = Σσ."""
        return float(self.sigma.sum())

    @property
    def below_floor(self) -> int:
        """How many singular values lie under the floor: directions that are rounding noise."""
        return int((self.normalised < self.floor).sum())


def spectrum(matrix: NDArray[np.floating], *, unit_roundoff: float | None = None, gram: Floats | None = None) -> Spectrum:
    """Singular values of `matrix` in float64, κ right to 1e-4 for κ ≤ 1e6 and to 1e-2 for κ ≤ 1e7.

    σ² are the eigenvalues of BBᵀ, B the matrix with its short side first, in float64. Where those reach the limit of
    that route (κ > 2e5) the singular values come from a float64 SVD of B, unless M's own precision ends earlier.

    Args:
        matrix: shape (m, n), any real floating dtype, finite and not zero.
        unit_roundoff: of the format the numbers were stored in, when they come in a wider one (bfloat16: 2⁻⁸);
            by default that of `matrix.dtype`.
        gram: MMᵀ of the short side in float64 where something else has made it, shape (r, r), or its eigenvalues ascending,
            shape (r,); of a matrix whose squares stay inside float64.

    Raises:
        ValueError: not a matrix, empty, not finite, or all zeros.
        TypeError: whole or complex numbers.

    >>> s = spectrum(np.diag([8.0, 4.0, 2.0]))
    >>> s.condition_number, round(s.stable_rank, 4), s.below_floor
    (4.0, 1.3125, 0)
    """
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"matrix: expected two non-empty dimensions, got shape {matrix.shape}; reshape it to (rows, columns)")
    if not np.issubdtype(matrix.dtype, np.floating):
        raise TypeError(f"matrix: expected real floating-point numbers, got {matrix.dtype}; convert it with astype")
    if unit_roundoff is None:
        unit_roundoff = float(np.finfo(matrix.dtype).eps) / 2
    largest = largest_magnitude(matrix)
    if not np.isfinite(largest):
        raise ValueError("matrix: expected finite numbers, got NaN or infinity; its spectrum is undefined")
    if largest == 0:
        raise ValueError("matrix: expected a nonzero matrix, got all zeros; its condition number is undefined")
    # A power of two near the largest entry keeps the squares of tiny or huge numbers inside float64 and rounds nothing.
    exponent = int(np.frexp(largest)[1])
    exponent = 0 if abs(exponent) <= _SAFE_EXPONENT or gram is not None else exponent
    if gram is None:
        short = _short_side_first(matrix, exponent)
        gram = short @ short.T  # BLAS computes one half of it
    # np.linalg rather than scipy: SciPy's LAPACK wrappers hold the interpreter lock.
    squares = gram if gram.ndim == 1 else np.linalg.eigvalsh(gram)
    fro_norm = float(np.sqrt(squares.sum() if gram.ndim == 1 else np.trace(gram)))
    floor = precision_floor(matrix.shape[0], matrix.shape[1], unit_roundoff)
    sigma = np.sqrt(np.clip(squares[::-1], 0, None))
    if sigma[-1] * GRAM_CONDITION_LIMIT < sigma[0] and floor * GRAM_CONDITION_LIMIT < 1:
        sigma = np.linalg.svd(
            _short_side_first(matrix, exponent).T, compute_uv=False
        )  # the long side first: a third less than the other way
        # The SVD's own backward error, relative to σ_1: the floor of a float64 input.
        floor = max(floor, max(matrix.shape) * 2.0**-52 * float(sigma[0]) / fro_norm)
    return Spectrum(np.ldexp(sigma, exponent), float(np.ldexp(fro_norm, exponent)), floor)


def _short_side_first(matrix: NDArray[np.floating], exponent: int) -> Floats:
    """B·2^−exponent in float64, B the matrix with its short side first."""
    # Turned after the conversion, which is a view: writing the transpose costs as much as half of the product.
    wide = np.asarray(matrix, dtype=np.float64)
    short = wide if matrix.shape[0] <= matrix.shape[1] else wide.T
    return np.ldexp(short, -exponent) if exponent else short


def largest_magnitude(matrix: NDArray[np.floating]) -> float:
    """max |M_ij|; NaN where there is one."""
    # Not abs().max(): touching the memory of one more large temporary costs a tenth of the products that follow.
    return max(float(matrix.max()), -float(matrix.min()))


def precision_floor(rows: int, cols: int, unit_roundoff: float) -> float:
    """Smallest σ/‖M‖_F above the rounding noise of M's storage format: φ = 0.425·u·(1/√rows + 1/√cols).

    The spectral norm of the rounding errors of an m×n matrix, taken as independent: ‖E‖_F(1/√m + 1/√n). Singular
    directions below it cannot be told from rounding. bfloat16, 256²: predicted 2.08e-4, measured 2.1–2.2e-4.
    """
    return ROUNDING_NOISE * unit_roundoff * (1 / sqrt(rows) + 1 / sqrt(cols))
