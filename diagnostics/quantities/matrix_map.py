"""A matrix too large to keep, seen as at most 16 × 16 tiles."""

import numpy as np
from numpy.typing import NDArray

from ..catalogue import MAP_SIDE
from .panels import as_float64, row_panels

Floats = NDArray[np.float64]


def edges(length: int) -> NDArray[np.int64]:
    """Where the tiles along an axis begin, and the end: min(16, length) of them, of sizes that differ by at most one."""
    return np.linspace(0, length, min(MAP_SIDE, length) + 1).astype(np.int64)


def log_map(v: NDArray[np.floating]) -> Floats:
    """Mean of log10 v over the elements with v > 0 of every tile, row by row, NaN after the last tile and where a tile has none."""
    row_starts, column_starts = edges(v.shape[0])[:-1], edges(v.shape[1])[:-1]
    totals, counts = [], []
    for panel in row_panels(*v.shape):
        block = as_float64(v[panel])
        positive = block > 0
        totals.append(np.add.reduceat(np.log10(np.where(positive, block, 1.0)), column_starts, axis=1))
        counts.append(np.add.reduceat(positive.astype(np.float64), column_starts, axis=1))
    total, count = (np.add.reduceat(np.concatenate(parts), row_starts) for parts in (totals, counts))
    return _filled(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def rank1_log_map(row_sums: Floats, column_sums: Floats) -> Floats:
    """The same of v̂₁ = (row sums)(column sums)/Σ, over all elements of a tile whose row and column are not zero."""
    with np.errstate(divide="ignore"):
        rows, columns = (_means(np.log10(sums)) for sums in (row_sums, column_sums))
        return _filled(rows[:, None] + columns - np.log10(row_sums.sum()))


def _means(logs: Floats) -> Floats:
    """Mean over the finite numbers of every tile along an axis, NaN where there are none."""
    starts = edges(len(logs))[:-1]
    finite = np.isfinite(logs)
    count = np.add.reduceat(finite.astype(np.float64), starts)
    return np.where(count > 0, np.add.reduceat(np.where(finite, logs, 0.0), starts) / np.maximum(count, 1), np.nan)


def _filled(tiles: Floats) -> Floats:
    """Tiles row by row in a vector of the size that a map has."""
    whole = np.full(MAP_SIDE * MAP_SIDE, np.nan)
    whole[: tiles.size] = tiles.ravel()
    return whole
