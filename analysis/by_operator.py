"""A quantity of matrices, told per operator: over the training, and as one number with its error bar."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from ..diagnostics.bootstrap import median_interval
from ..diagnostics.nan_quantile import nan_quantile
from .run import median_by, operators_of, places_of


def by_operator(values: Mapping[str, xr.DataArray]) -> xr.Dataset:
    """Medians over the matrices of each operator, of quantities (step, matrix) with the coordinates `operator` and `layer`.

    Returns:
        Per name: `name` (step, operator) with the quartiles `name_lower` and `name_upper`; `median_name` (operator), a matrix counting
        once with its median over the records, with `median_name_low` and `median_name_high`, 95 % over layers.
    """
    first = next(iter(values.values()))
    operators, label = operators_of(first), first["operator"].values
    result = xr.Dataset(coords={"step": first["step"].values, "operator": operators})
    for name, value in values.items():
        for suffix, q in (("", 0.5), ("_lower", 0.25), ("_upper", 0.75)):
            result[name + suffix] = (("step", "operator"), median_by(value, label, operators, q))
        for suffix, bars in zip(("_low", "", "_high"), medians_by(value, label, operators), strict=True):
            result[f"median_{name}{suffix}"] = ("operator", bars)
    return result


def medians_by(values: xr.DataArray, labels: ArrayLike, order: Sequence[Any]) -> NDArray[np.float64]:
    """Of the matrices of each label: lower end, median, upper end, the ends over resampled layers; shape (3, len(order)).

    A matrix counts once, with its median over the records; what is missing or not finite is left out, and an end is missing
    where `layer_interval` has none.

    Args:
        values: (step, matrix), with the coordinate `layer`.
        labels: of every matrix, shape (matrices,).
        order: the labels asked for.
    """
    per_matrix = nan_quantile(np.where(np.isfinite(values.values), values.values, np.nan).T)
    known, layers = np.isfinite(per_matrix), values["layer"].values
    found = np.full((3, len(order)), np.nan)
    for i, own in enumerate(places_of(labels, order)):
        chosen = own[known[own]]
        if len(chosen):
            low, high = median_interval(per_matrix[chosen], layers[chosen])
            found[:, i] = low, np.median(per_matrix[chosen]), high
    return found


def median_and_extremes(values: pd.Series, spec: str) -> str:
    """The median of one number per operator, and the operators with the smallest and the largest, for a sentence.

    >>> median_and_extremes(pd.Series({"attn_q": 3.0, "attn_k": 1.0, "mlp_up": 2.0}), ".1f"), median_and_extremes(pd.Series({"attn_q": 3.0}), ".1f")
    ('2.0 (median; attn_k 1.0 to attn_q 3.0)', '3.0')
    """
    ranked = values.dropna().sort_values()
    median = f"{ranked.median():{spec}}"
    if len(ranked) < 2:
        return median
    return f"{median} (median; {ranked.index[0]} {ranked.iloc[0]:{spec}} to {ranked.index[-1]} {ranked.iloc[-1]:{spec}})"
