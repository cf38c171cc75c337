"""Error bars: what a statistic would be had the run had other layers of the same kind."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

RESAMPLES = 999
LEVEL = 0.95


def layer_interval(statistic: Callable[[NDArray[np.int64]], float], layers: ArrayLike) -> tuple[float, float]:
    """95 % percentile interval of a statistic over resampled layers, whole layers at a time (a cluster bootstrap).

    Matrices of one layer are not independent of each other and records of one matrix even less, so what is drawn, with
    replacement, are layers with all that belongs to them. Seeded: the same run gives the same interval. An interval over
    few layers is too narrow (with 4 of them a nominal 95 % covers about 80 %); it is missing under 3.

    Args:
        statistic: a function of the chosen matrices' indices (with repetitions) to a number; NaN where it has none.
        layers: the layer of every matrix, shape (matrices,); matrices without one (−1) each count as a layer of their own.

    Returns:
        Lower and upper end, NaN where there are fewer than 3 layers or the statistic has no value.
    """
    members = _members(layers)

    def of_layers(chosen: NDArray[np.int64]) -> float:
        return statistic(np.concatenate([members[int(i)] for i in chosen]))

    return _interval(of_layers, len(members), vectorized=False)


def median_interval(values: NDArray[np.float64], layers: ArrayLike) -> tuple[float, float]:
    """`layer_interval` of the median of finite `values` (matrices,), all resamples at once."""
    members = _members(layers)
    padded = np.full((len(members), max(map(len, members))), np.nan)
    for own, matrices in zip(padded, members, strict=True):
        own[: len(matrices)] = values[matrices]

    def of_layers(chosen: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        return np.asarray(np.nanmedian(padded[chosen].reshape(*chosen.shape[:-1], -1), axis=-1))

    return _interval(of_layers, len(members), vectorized=True)


def _members(layers: ArrayLike) -> list[NDArray[np.int64]]:
    """The matrices of each layer."""
    label = np.asarray(layers, dtype=np.int64)
    label = np.where(label < 0, -1 - np.arange(len(label)), label)
    return [np.flatnonzero(label == layer) for layer in np.unique(label)]


def _interval(of_layers: Callable[..., Any], layers: int, *, vectorized: bool) -> tuple[float, float]:
    if layers < 3:
        return float("nan"), float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample may hold no value
        found: Any = bootstrap(
            (np.arange(layers),), of_layers, n_resamples=RESAMPLES, confidence_level=LEVEL, vectorized=vectorized, method="percentile",
            rng=np.random.default_rng(0),
        )  # fmt: skip
    # Of the finite resamples only: one without a value (all its matrices unrecorded) says nothing.
    drawn = found.bootstrap_distribution[np.isfinite(found.bootstrap_distribution)]
    if len(drawn) < RESAMPLES / 2:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def medians_by(values: xr.DataArray, labels: ArrayLike, order: Sequence[Any]) -> NDArray[np.float64]:
    """Of the matrices of each label: lower end, median, upper end, the ends over resampled layers; shape (3, len(order)).

    A matrix counts once, with its median over the records; what is missing or not finite is left out, and an end is missing
    where `layer_interval` has none.

    Args:
        values: (step, matrix), with the coordinate `layer`.
        labels: of every matrix, shape (matrices,).
        order: the labels asked for.
    """
    finite = np.where(np.isfinite(values.values), values.values, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # matrices without any value
        per_matrix = np.nanmedian(finite, axis=0)
    known, label, layers = np.isfinite(per_matrix), np.asarray(labels), values["layer"].values
    found = np.full((3, len(order)), np.nan)
    for i, one in enumerate(order):
        chosen = known & (label == one)
        if chosen.any():
            own = per_matrix[chosen]
            low, high = median_interval(own, layers[chosen])
            found[:, i] = low, np.median(own), high
    return found
