"""A quantity of matrices, told per operator: over the training, and as one number with its error bar."""

from collections.abc import Mapping

import pandas as pd
import xarray as xr

from .bootstrap import medians_by
from .run import median_by, operators_of


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
