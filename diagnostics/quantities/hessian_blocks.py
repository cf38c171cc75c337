"""How far a matrix's Hessian is block-diagonal, and what Adam's diagonal makes of a block (Adam-mini, arXiv 2406.16793)."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..catalogue import MAP_SIDE

Floats = NDArray[np.float64]

# Random points x at which Adam's diagonal is taken; the median over them is reported.
POINTS_PER_BLOCK = 5


def in_block_share(inside: ArrayLike, column: ArrayLike) -> tuple[float, float]:
    """Share of ‖H_jj‖_F² inside the blocks of matrix j, and its standard error, from K probes on sampled blocks.

    With u on block b alone and unit variance, E‖(Hu)_b‖² = ‖H_bb‖_F² and E‖(Hu)_j‖² = ‖H_jb‖_F²; blocks being drawn with equal
    probability, the ratio of sums R = Σ inside/Σ column tends to Σ_b ‖H_bb‖_F²/‖H_jj‖_F². Its error is that of a ratio,
    √(K/(K − 1)·Σ(inside − R·column)²)/Σ column; the bias is of order 1/K.

    Args:
        inside: ‖(Hu)_b‖² of every probe, shape (K,).
        column: ‖(Hu)_j‖².

    >>> in_block_share([1.0, 1.0], [4.0, 4.0])
    (0.25, 0.0)
    """
    a, c = (np.asarray(values, dtype=np.float64) for values in (inside, column))
    total, count = float(c.sum()), len(c)
    if not total > 0:
        return math.nan, math.nan
    share = float(a.sum()) / total
    error = math.sqrt(count / (count - 1) * float(((a - share * c) ** 2).sum())) / total if count > 1 else math.nan
    return share, error


def in_block_null(block_of_row: ArrayLike) -> float:
    """Σ_b d_b²/d²: the share inside blocks of whole rows if all of the Hessian's entries had one size.

    >>> in_block_null([0, 0, 1, 1])
    0.5
    """
    counts = np.unique(np.asarray(block_of_row), return_counts=True)[1]
    return float(((counts / counts.sum()) ** 2).sum())


# An eigenvalue is told from rounding noise when it exceeds the noise by this factor.
READABLE = 4.0


def preconditioning_effect(hessian: NDArray[np.floating[Any]], x: ArrayLike, roundoff: float = 2.0**-53) -> tuple[float, float]:
    """r = κ(D·H)/κ(H) and κ(H), with D = diag(1/|Hx|): what Adam's diagonal does to the conditioning of a quadratic ½xᵀHx.

    D is Adam's after its first step from x, where v = (Hx)². κ is max|λ|/min|λ|, that of D·H by its similarity to
    D^½·H·D^½; NaN where min|λ| is not 4 times the rounding noise: the roundoff of max|λ|, or ‖(H − Hᵀ)/2‖₂, which tells what errors
    the entries really have. Source: Adam-mini, Eq. 2.

    Args:
        hessian: H of one block, shape (d, d); its symmetric part is taken.
        x: a point, shape (d,), or several, shape (n, d), of which the median ratio is given.
        roundoff: unit roundoff of H's entries.

    >>> preconditioning_effect(np.diag([1.0, 4.0]), [1.0, -1.0])  # D·H is the identity
    (0.25, 4.0)
    """
    h = np.asarray(hessian, dtype=np.float64)
    kappa, ratios = _condition_number(h, roundoff), []
    for point in np.atleast_2d(np.asarray(x, dtype=np.float64)):
        with np.errstate(divide="ignore", invalid="ignore"):
            root = 1 / np.sqrt(np.abs(h @ point))
            ratios.append(_condition_number(root[:, None] * h * root, roundoff) / kappa)
    return float(np.median(ratios)), kappa


def _condition_number(matrix: Floats, roundoff: float) -> float:
    if not np.isfinite(matrix).all():
        return math.nan
    size = np.abs(np.linalg.eigvalsh((matrix + matrix.T) / 2))
    noise = max(roundoff * float(size.max()), float(np.linalg.norm((matrix - matrix.T) / 2, 2)))
    return float(size.max() / size.min()) if size.min() > READABLE * noise else math.nan


def diagonal_dominance(hessian: NDArray[np.floating[Any]]) -> float:
    """τ = Σ_i |H_ii|/Σ_ij |H_ij|, from 1/d (all entries alike) to 1 (diagonal); NaN for a zero matrix.

    >>> diagonal_dominance(np.array([[3.0, -1.0], [1.0, 3.0]]))
    0.75
    """
    size = np.abs(np.asarray(hessian, dtype=np.float64))
    total = float(size.sum())
    return float(np.trace(size)) / total if total > 0 else math.nan


def tile_map(hessian: NDArray[np.floating[Any]]) -> Floats:
    """log10 of the mean |H_ij| over tiles, min(16, d) a side, shape (256,), row by row, the rest NaN. −inf where a tile is zero.

    >>> tile_map(np.diag([1.0, 100.0]))[:4].tolist()
    [0.0, -inf, -inf, 2.0]
    """
    size = np.abs(np.asarray(hessian, dtype=np.float64))
    side = min(MAP_SIDE, len(size))
    edges = np.arange(side) * len(size) // side
    sums = np.add.reduceat(np.add.reduceat(size, edges, axis=0), edges, axis=1)
    counts = np.diff([*edges, len(size)])
    found = np.full(MAP_SIDE * MAP_SIDE, np.nan)
    with np.errstate(divide="ignore"):
        found[: side * side] = np.log10(sums / np.outer(counts, counts)).ravel()
    return found
