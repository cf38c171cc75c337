"""The moments that an optimizer keeps of one matrix, and everything that is measured on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, isnan, log10, nan, sqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..catalogue import LEVELS, PARTITIONS
from .adam_mini import within_blocks
from .factored import rank1, sums
from .kronecker_factors import condition_and_rank, off_diagonal
from .log_bins import log_quantiles
from .matrix_map import log_map, rank1_log_map
from .measured import Measured, quietly

Floats = NDArray[np.float64]
Array: TypeAlias = NDArray[np.floating]

# Forms that hold a number for every coordinate of the parameter, in its own basis: blocks, factors and maps are of these.
OF_EVERY_COORDINATE = frozenset({"full", "quantised", "frozen"})
# Forms that the update divides by the root of, entry by entry of the basis that they are in.
_DIVIDES = OF_EVERY_COORDINATE | {"row_col", "row", "block", "scalar", "rotated", "projected"}
# Those of them that are in the parameter's own basis, so that coupled weight decay goes through them.
_DIVIDES_WEIGHTS = _DIVIDES - {"rotated", "projected"}


@dataclass(frozen=True)
class Moments:
    """First and second moment as the optimizer keeps them of one matrix after a step, decoded.

    Attributes:
        v: second moment, of shape (rows, cols) or the smaller one that its form has.
        form: one of `catalogue.SECOND_MOMENT_FORMS`.
        mean: mean of v.
        m: first moment in the basis and shape of v; None where there is none.
        v_weight, m_weight: weight of all gradients in the averages as the optimizer corrects for it, 1 − β₂ᵗ and 1 − β₁ᵗ; 1 where
            it does not correct; NaN where that is not known.
        eps: the optimizer's denominator at v = 0, in units of √v̂; NaN where there is none or it is not known.
        coupled_decay: λ of a weight decay that is part of the gradient; 0 where decay is decoupled, NaN without decay and where it
            takes another way.
        partition: name of the partition and block of every row, of :func:`.adam_mini.row_blocks`.
        clipped: the update's coordinates before they are clipped at 1 (Sophia).
        factors, bases: symmetric Kronecker factors of rows and columns, and the bases kept for them; None where there is none.
        exponent: p of LᵖGRᵖ.
    """

    v: Array
    form: str
    mean: float
    m: Array | None = None
    v_weight: float = nan
    m_weight: float = nan
    eps: float = nan
    coupled_decay: float = nan
    partition: tuple[str, NDArray[np.int64]] | None = None
    clipped: Array | None = None
    factors: Sequence[Array | None] = (None, None)
    bases: Sequence[Array | None] = (None, None)
    exponent: float = nan


@quietly
def measure_second_moment(seen: Moments) -> Measured:
    """The quantities of the group `second_moment` but its form; only those that are defined for the form."""
    v = seen.v
    corrected = log_quantiles(v, LEVELS) / seen.v_weight
    measured: Measured = {"second_moment_mean": seen.mean, "second_moment_quantile": corrected}
    if seen.form in _DIVIDES:
        measured["second_moment_eps"] = seen.eps
        measured["eps_share"] = share_under(v, seen.eps, seen.v_weight)
        measured["near_eps_share"] = share_under(v, 1000 * seen.eps, seen.v_weight)
        if seen.m is not None and isfinite(seen.m_weight) and seen.m.shape == v.shape:
            measured["snr_quantile"] = log_quantiles(signal_to_noise(seen.m, v), LEVELS) * (sqrt(seen.v_weight) / seen.m_weight)
    if seen.form in _DIVIDES_WEIGHTS:
        measured["decay_spread"] = decay_spread(corrected, seen.eps, seen.coupled_decay)
    if seen.form in OF_EVERY_COORDINATE and v.ndim == 2:
        lost = rank1(v)
        measured |= {"rank1_information": lost.information, "rank1_log_error": lost.log_error, "rank1_log_error_max": lost.log_error_max}
        if seen.partition is not None:
            measured |= _blocks(seen, *seen.partition)
    if seen.form == "rotated" and v.ndim == 2:
        measured["eigenbasis_information"] = rank1(v).information
    if seen.form == "hessian":
        measured["sophia_nonpositive_share"] = float(np.count_nonzero(v <= 0)) / v.size
    if seen.clipped is not None:
        measured["sophia_win_rate"] = float(np.count_nonzero(np.abs(seen.clipped) < 1)) / seen.clipped.size
    measured["factor_exponent"] = seen.exponent
    if any(factor is not None for factor in seen.factors):
        sides = [(nan, nan) if factor is None else condition_and_rank(factor) for factor in seen.factors]
        measured["factor_condition"], measured["factor_effective_rank"] = np.array(sides).T
        kept = zip(seen.factors, seen.bases, strict=True)
        measured["eigenbasis_off_diagonal"] = np.array([nan if f is None or q is None else off_diagonal(f, q) for f, q in kept])
    return measured


@quietly
def measure_second_moment_map(seen: Moments) -> Measured:
    """The quantities of the group `second_moment_map`; nothing where v is not of every coordinate, factored ones multiplied out."""
    if seen.form not in OF_EVERY_COORDINATE | {"row_col"} or seen.v.ndim != 2:
        return {}
    return {"second_moment_map": log_map(seen.v), "rank1_map": rank1_log_map(*sums(seen.v))}


def share_under(v: Array, bound: float, weight: float = 1.0) -> float:
    """Share of elements with √(v/weight) < bound, counted exactly; NaN where bound or weight is.

    >>> share_under(np.array([1.0, 4.0, 9.0, 16.0], dtype=np.float32), 3.0)
    0.5
    """
    square = bound * bound * weight
    if isnan(square):
        return nan
    # In the format of v the bound may round down, or to zero: then v < bound is not what is asked.
    threshold = v.dtype.type(square)
    if float(threshold) < square:
        threshold = np.nextafter(threshold, v.dtype.type(np.inf))
    return float(np.count_nonzero(v < threshold)) / v.size


def signal_to_noise(m: Array, v: Array) -> Array:
    """|m|/√v of every element; 0 where both are zero, as such an element does not move."""
    ratio: Array = np.abs(m) / np.sqrt(v)
    if not v.all():
        ratio[(v == 0) & (m == 0)] = 0
    return ratio


def decay_spread(v_quantiles: Floats, eps: float, coupled_decay: float) -> float:
    """log10 of the 95 % over the 5 % quantile of ηλ/(√v̂ + ε), from the quantiles of v̂ at `LEVELS`; 0 for λ = 0, NaN for NaN.

    The rate falls with v̂: its quantiles are at those of v̂ from the other end. Each is right to 2⁻⁵ of √v̂: ± 0.03 decades at most.
    """
    if not coupled_decay:
        return 0.0
    if isnan(coupled_decay):
        return nan
    low, high = (sqrt(v_quantiles[LEVELS.index(level)]) + (0.0 if isnan(eps) else eps) for level in (0.05, 0.95))
    return log10(high / low) if low > 0 and isfinite(high) else nan


def _blocks(seen: Moments, name: str, blocks: NDArray[np.int64]) -> dict[str, float | Floats]:
    # Momentum that is not an average of gradients (its weight is not known) makes no update of m and v.
    lost = within_blocks(seen.v, blocks, seen.m if isfinite(seen.m_weight) else None)
    return {
        "block_partition": PARTITIONS.index(name),
        "block_dispersion": lost.dispersion,
        "block_variance_ratio": lost.variance_ratio,
        "block_cv2": lost.cv2,
        "block_step_ratio": lost.step_ratio,
        "block_cosine": lost.cosine,
    }
