"""What rules share: a group's records of every matrix, a matrix's typical value, and how the matrices concerned are counted and named."""

import warnings
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from ...diagnostics.catalogue import EXTRA_DIMENSIONS, in_group
from ..run import records


def group(run: xr.DataTree, name: str) -> xr.Dataset:
    """A group with all of the catalogue's quantities, so that a rule need not ask which of them a run has.

    A quantity that was not recorded is missing everywhere; a group that was not is one of no records and no matrices.
    """
    if name in run.children and run[name].sizes.get("step") and "matrix" in run[name].sizes:
        dataset = records(run, name)
    else:
        none = ("matrix", np.empty(0, dtype=int))
        texts = {coordinate: ("matrix", np.empty(0, dtype=str)) for coordinate in ("name", "operator", "optimizer")}
        dataset = xr.Dataset(coords={**texts, "layer": none, "rows": none, "cols": none, "step": np.empty(0, dtype=int)})
    sizes: dict[Any, int] = {**EXTRA_DIMENSIONS, **dataset.sizes}
    absent = {}
    for quantity in (q for q in in_group(name) if q.name not in dataset):
        dims = ("step", "matrix") if quantity.extra is None else ("step", "matrix", quantity.extra)
        value = np.array(quantity.missing, dtype=quantity.dtype)
        absent[quantity.name] = (dims, np.broadcast_to(value, [sizes[dim] for dim in dims]))
    return dataset.assign(absent)


def typical(values: ArrayLike, where: ArrayLike = True) -> NDArray[np.float64]:
    """Median over the chosen records of every matrix, missing values left out; (step, matrix) → (matrix,), NaN where there are none."""
    found = np.where(where, np.asarray(values, dtype=np.float64), np.nan)
    if not len(found):
        return np.full(found.shape[1:], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a matrix that is missing everywhere
        return np.asarray(np.nanmedian(found, axis=0))


def count(chosen: ArrayLike) -> str:
    """How many matrices are chosen, in words."""
    number = int(np.sum(chosen))
    return "1 matrix" if number == 1 else f"{number} matrices"


def names(dataset: xr.Dataset, chosen: ArrayLike) -> tuple[str, ...]:
    """Names of the chosen matrices."""
    return tuple(str(name) for name in dataset["name"].values[np.asarray(chosen)])
