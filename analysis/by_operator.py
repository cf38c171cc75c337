"""A quantity of matrices, told per operator: over the training, and as one number with its error bar."""

from collections.abc import Mapping

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
