"""What bfloat16 makes of a Newton–Schulz iteration, predicted from a spectrum alone.

Casting M to bfloat16 and dividing by its norm round every number twice: X₀ = M/‖M‖_F + E with ‖E‖_F ≈ √2·0.425·2⁻⁸. From there on the
iteration acts on the singular values of X₀, not on those of M: noise lifts values under it, and further steps make that noise, not the
momentum, orthogonal. Four effects are modelled.

1. E as independent Gaussian numbers. Such noise has no preferred direction, so that singular values and the turn of singular vectors depend on the
   spectrum of M and its shape alone: those of diag(x) + E for one fixed draw. This is the free convolution of x with a Marchenko–Pastur law,
   the null space of a rank-deficient M included.
2. Entries of a trained momentum are uneven, and the larger ones round coarser: the weaker half of its directions received 0.90 of evenly
   spread noise (mean over 56 momenta of the demo model; 0.72 to 1.0).
3. ‖M‖_F is rounded to bfloat16 too, up to 0.2 %: the same scale for all singular values, and known where ‖M‖_F is.
4. The last step rounds XXᵀ, bA + cA² and O, which leaves a Gram residual of about 0.005 however many steps are done. Roundings of earlier
   steps are smaller than what the first has left, or undone by the steps after them.

Errors, as measured: relative to torch's own iteration (CPU, bfloat16) on 56 momenta of a 128-wide Llama (steps 5 to 80, up to 40 % of singular values
under the floor), largest over the families cubic, Jordan, Polar Express, matched, CANS and You:

    steps                                        3       4       5       6      7      8
    Gram residual, mean of an operator        0.1 %   0.2 %   1.0 %   4.5 %   13 %   29 %
    Gram residual, 95 % of single matrices    0.2 %   0.6 %   1.3 %    13 %   36 %   31 %
    alignment, mean of an operator (absolute) 0.002   0.005   0.003   0.003  0.004  0.003

The large relative errors from 6 steps on are of residuals that are small (0.005 to 0.1): the smallest singular values and the last rounding decide there.
float64's recurrence is off by 3 %, 17 %, 34 % and 100 % of an operator's mean at 5, 6, 7 and 8 steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..newton_schulz.families import Coefficients
from ..newton_schulz.matrix_iteration import to_bfloat16
from ..newton_schulz.recorded_spectra import outputs_under
from ..newton_schulz.spectral_map import gram_residual, ns_map
from ..spectra.spectrum import BFLOAT16_ROUNDOFF, ROUNDING_NOISE

Floats = NDArray[np.float64]

ROUNDING = ROUNDING_NOISE * BFLOAT16_ROUNDOFF
UNEVEN = 0.90
# A spectrum of higher rank is represented by as many of its values: shares of noise hang on the shape's ratio and on quantiles.
STAND_IN = 128
TOGETHER = 64  # spectra; so many of their matrices fit a processor's cache


@dataclass(frozen=True)
class RoundedStart:
    """X₀ of the bfloat16 iteration.

    Attributes:
        x: its singular values, descending, shape (..., r).
        signal: u_iᵀ(M/‖M‖_F)v_i, u_i and v_i its singular vectors: what of the momentum an output along them carries; same shape.
    """

    x: Floats
    signal: Floats


def rounded_start(x: ArrayLike, rows: int, cols: int, fro_norm: ArrayLike | None = None, eps: float = 0.0) -> RoundedStart:
    """What the cast to bfloat16 makes of spectra x = σ/‖M‖_F, shape (..., r), descending, of matrices of one shape.

    Args:
        x: normalised singular values.
        rows, cols: of the matrices.
        fro_norm: ‖M‖_F, shape (...): its own rounding scales X₀. Without it that scale is taken as 1.
        eps: least divisor.

    >>> start = rounded_start([0.8, 0.6, 0.0], 3, 3)  # noise of 0.9·√2·0.00166/3 = 7e-4 per entry lifts the last, which holds nothing of M
    >>> start.x.round(2).tolist(), bool(0 < start.x[2] < 2e-3), bool(abs(start.signal[2]) < 1e-5)
    ([0.8, 0.6, 0.0], True, True)
    """
    x = np.asarray(x, dtype=np.float64)
    flat = x.reshape(-1, x.shape[-1])
    parts = [_with_noise(flat[i : i + TOGETHER], rows, cols) for i in range(0, len(flat), TOGETHER)]
    values, signal = (np.concatenate(side).reshape(x.shape) if parts else x for side in zip(*parts, strict=True))
    if fro_norm is not None:
        norm = np.asarray(fro_norm, dtype=np.float64)
        values = values * (norm / np.maximum(to_bfloat16(norm.astype(np.float32)), eps))[..., None]
    return RoundedStart(values, signal)


def _with_noise(x: Floats, rows: int, cols: int) -> tuple[Floats, Floats]:
    """Singular values of diag(x) + E and what of diag(x) each of their directions holds, for x of shape (spectra, r)."""
    r, q = min(rows, cols), max(rows, cols)
    rank = min(r, STAND_IN)
    chosen = np.rint((np.arange(rank) + 0.5) * r / rank - 0.5).astype(np.int64)
    own = x[:, chosen]
    # Of r×q noise with ‖E‖_F fixed the edge is ∝ 1/√r + 1/√q per entry; a stand-in of the same ratio keeps it with this deviation.
    deviation = UNEVEN * sqrt(2) * ROUNDING / sqrt(rank * q)
    noise = deviation * np.random.default_rng(0).standard_normal((rank, max(rank, round(q * rank / r))))
    square = noise[:, :rank] + own[:, :, None] * np.eye(rank)
    squares, u = np.linalg.eigh(square @ square.swapaxes(1, 2) + noise[:, rank:] @ noise[:, rank:].T)
    squares, u = squares[:, ::-1], u[:, :, ::-1]
    values = np.sqrt(np.maximum(squares, np.finfo(np.float64).tiny))
    # uᵀ·diag(x)·v with v = (diag(x) + E)ᵀu/σ.
    signal = np.einsum("sij,si,sij->sj", u, own, square.swapaxes(1, 2) @ u) / values
    if rank == r:
        return values, signal
    edge = np.maximum(own, deviation * sqrt(q * rank / r))
    place = np.arange(r)
    right = np.clip(np.searchsorted(chosen, place), 1, rank - 1)
    weight = np.clip((place - chosen[right - 1]) / (chosen[right] - chosen[right - 1]), 0, 1)
    whole = np.maximum(x, deviation * sqrt(q * rank / r))
    values, signal = (whole * ((side / edge)[:, right - 1] * (1 - weight) + (side / edge)[:, right] * weight) for side in (values, signal))
    return values, signal


def rounding_of_last_step(before: ArrayLike, last: tuple[float, float, float], rows: int, cols: int) -> Floats:
    """Gram residual that the roundings of one step leave, from the singular values before it, over the last axis.

    X ← aX + BX, A = XXᵀ, B = bA + cA², each of A, B and the sum rounded by ρ = 0.425·2⁻⁸ of its norm. To first order OOᵀ moves by
    E_O·Oᵀ + its transpose and by 2·E_B·X·Oᵀ, E_B = (b + 2cA)E_A + E_round; as independent errors

        ε̃² = 2ρ²(r/q)·⟨o²⟩² + 4ρ²·⟨x²⟩⟨o²⟩·(⟨(b + 2cx²)²⟩⟨x⁴⟩ + ⟨(bx² + cx⁴)²⟩),  ⟨·⟩ the mean over i.
    """
    x = np.asarray(before, dtype=np.float64)
    _, b, c = last
    with np.errstate(over="ignore", invalid="ignore"):
        square = x * x
        out, size = np.mean(ns_map(x, (last,)) ** 2, axis=-1), np.mean(square, axis=-1)
        of_gram = np.mean((b + 2 * c * square) ** 2, axis=-1) * np.mean(square**2, axis=-1)
        of_sum = np.mean((b * square + c * square**2) ** 2, axis=-1)
        ratio = min(rows, cols) / max(rows, cols)
        return np.asarray(ROUNDING * np.sqrt(2 * ratio * out**2 + 4 * size * out * (of_gram + of_sum)))


def bfloat16_outcomes(
    x: ArrayLike, rows: int, cols: int, schedules: Sequence[Coefficients], fro_norm: ArrayLike | None = None, eps: float = 0.0
) -> tuple[Floats, Floats]:
    """Gram residual ε̃ and alignment ⟨M, O⟩/‖M‖_* that the bfloat16 iteration would reach, each of shape (schedules, spectra).

    Args:
        x: normalised singular values of matrices of one shape, descending, shape (spectra, r).
        rows, cols: of the matrices.
        schedules: of at least one step each.
        fro_norm, eps: as for :func:`rounded_start`.

    Raises:
        ValueError: a schedule without steps.
    """
    if any(not schedule for schedule in schedules):
        raise ValueError("schedules: expected at least one (a, b, c) triple in each, got none")
    x = np.asarray(x, dtype=np.float64)
    start = rounded_start(x, rows, cols, fro_norm, eps)
    residual, alignment = np.full((2, len(schedules), len(x)), np.nan)
    nuclear = x.sum(axis=-1)
    for i, before in outputs_under(start.x, [schedule[:-1] for schedule in schedules]):
        last = schedules[i][-1]
        o = ns_map(before, (last,))
        with np.errstate(over="ignore", invalid="ignore"):
            residual[i] = np.hypot(gram_residual(o), rounding_of_last_step(before, last, rows, cols))
            alignment[i] = (o * start.signal).sum(axis=-1) / nuclear
    return residual, alignment
