"""Error bars: what a statistic would be had the run had other layers of the same kind.

Matrices of one layer are not independent of each other and records of one matrix even less, so what is drawn, with
replacement, are layers with all that belongs to them (a cluster bootstrap). Seeded: the same run gives the same interval. An
interval over few layers is too narrow (with 4 of them a nominal 95 % covers about 80 %); it is missing under 3.
"""

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .nan_quantile import nan_quantile

RESAMPLES = 999
LEVEL = 0.95

Floats = NDArray[np.float64]


def layer_interval(statistic: Callable[[NDArray[np.int64]], float], layers: ArrayLike) -> tuple[float, float]:
    """95 % percentile interval of any statistic over resampled layers; for many statistics at once :func:`resampled` is much quicker.

    Args:
        statistic: a function of the chosen matrices' indices (with repetitions) to a number; NaN where it has none.
        layers: the layer of every matrix, shape (matrices,); matrices without one (−1) each count as a layer of their own.

    Returns:
        Lower and upper end, NaN where there are fewer than 3 layers or the statistic has no value.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample may hold no value
        low, high = interval(np.array([statistic(chosen[chosen >= 0]) for chosen in resamples(layers)], dtype=np.float64))
    return float(low), float(high)


def resampled(values: ArrayLike, layers: ArrayLike, seed: int = 0) -> Floats:
    """Values of the matrices of each resample: shape (…, matrices) → (…, resamples, width), filled up with NaN.

    A statistic over the last axis that leaves out NaN then gives its bootstrap distribution in one go, for :func:`interval`.
    Samples that are independent of each other (two sets of layers whose difference is wanted) take different seeds.
    """
    chosen = resamples(layers, seed)
    taken = np.asarray(values, np.float64)[..., np.maximum(chosen, 0)]
    return np.where(chosen >= 0, taken, np.nan)


def resamples(layers: ArrayLike, seed: int = 0) -> NDArray[np.int64]:
    """Indices of the matrices of each resample, shape (999, width), −1 for none; no rows where there are fewer than 3 layers."""
    label = np.asarray(layers, dtype=np.int64)
    label = np.where(label < 0, -1 - np.arange(len(label)), label)
    _, layer, counts = np.unique(label, return_inverse=True, return_counts=True)
    if len(counts) < 3:
        return np.empty((0, 0), dtype=np.int64)
    members = np.full((len(counts), counts.max()), -1)
    order = np.argsort(layer, kind="stable")
    members[layer[order], np.arange(len(label)) - np.repeat(np.cumsum(counts) - counts, counts)] = order
    drawn = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    return members[drawn].reshape(RESAMPLES, -1)


def multiplicities(layers: ArrayLike, seed: int = 0) -> Floats:
    """How often each matrix is in each resample, shape (999, matrices): sums over resamples are products with it."""
    chosen = resamples(layers, seed)
    width = len(np.asarray(layers)) + 1  # the first column counts the places that hold none
    place = chosen + 1 + width * np.arange(len(chosen))[:, None]
    return np.bincount(place.ravel(), minlength=width * len(chosen)).reshape(len(chosen), width)[:, 1:].astype(np.float64)


def interval(distribution: ArrayLike) -> tuple[Floats, Floats]:
    """Ends of the 95 % percentile interval over the last axis, of the finite ones among the resamples; NaN where those are not half of them."""
    values = np.asarray(distribution, np.float64)
    values = np.where(np.isfinite(values), values, np.nan)
    # Of the finite resamples only: one without a value (all its matrices unrecorded) says nothing.
    told = np.isfinite(values).sum(axis=-1) >= RESAMPLES / 2
    low, high = (np.where(told, nan_quantile(values, level), np.nan) for level in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return low, high


def with_interval(value: float, low: float, high: float, spec: str) -> str:
    """A number and its error bar, where it has one, for a sentence.

    >>> with_interval(2.0, 1.5, 2.25, ".2f"), with_interval(2.0, float("nan"), float("nan"), ".2f")
    ('2.00 (95 % 1.50 to 2.25)', '2.00')
    """
    return f"{value:{spec}}" + (f" (95 % {low:{spec}} to {high:{spec}})" if np.isfinite(low) and np.isfinite(high) else "")


def median_interval(values: Floats, layers: ArrayLike) -> tuple[float, float]:
    """`layer_interval` of the median of finite `values` (matrices,), all resamples at once."""
    low, high = interval(nan_quantile(resampled(values, layers)))
    return float(low), float(high)
