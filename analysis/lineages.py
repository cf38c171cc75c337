"""Lineages of a run that was restarted from a checkpoint: what it held before it went back (docs/store.md).

With L(n) the records of lineage n, N of which were left, and after(n) the step after which: L(N) is what the run holds now, and
L(n) = the records of L(n + 1) up to after(n), then those that were left.
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from ..diagnostics.store.format import LINEAGES, OF_LINEAGE
from ..diagnostics.store.run_error import RunError

_NOT_THE_RUNS = (*OF_LINEAGE, "chunks", "checksum")  # attributes of a lineage that are not those of the run at that time


def of_lineage(run: xr.DataTree, number: int | None, opened: Callable[[Sequence[Mapping[str, Any]]], Sequence[xr.DataTree]]) -> xr.DataTree:
    """A run as its root describes it → one lineage of it, by default the newest, its arrays read when used.

    Where there are several, attributes of the result say which it is (`lineage`) and list them all (`lineages`): `after`, the step after which
    one was left, None for the newest; `last_step` and `records`, those that the next one does not hold.

    Args:
        run: the newest; its attribute `lineages` lists the others.
        number: of the lineage.
        opened: opens those of chosen entries of that list.

    Raises:
        RunError: there is none of that number, or one of those that it consists of is damaged.
    """
    found = [{name: entry[name] for name in OF_LINEAGE} for entry in run.attrs.get(LINEAGES, [])]
    number = len(found) if number is None else number
    if not 0 <= number <= len(found):
        there = "it has one only, 0" if not found else f"it has 0 to {len(found)}, the newest"
        raise RunError(f"has none of number {number}", subject="lineage", advice=there)
    newest = {name: group.to_dataset() for name, group in run.children.items()}
    attributes = {key: value for key, value in run.attrs.items() if key not in (LINEAGES, "lineage")}
    if not found:
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes), **newest})
    extents = {name: dataset["step"].values for name, dataset in newest.items() if dataset.sizes.get("step")}
    now = {
        "lineage": len(found), "after": None, "last_step": max((int(steps[-1]) for steps in extents.values()), default=0),
        "records": max(map(len, extents.values()), default=0),
    }  # fmt: skip
    said = {"lineage": number, LINEAGES: [*found, now]}
    if number == len(found):
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes | said), **newest})
    # From the one asked for on to the newest: those of which it has records, and the last step of these. All records of one are after its `after`.
    held: list[Mapping[str, Any]] = []
    lasts: list[float] = []
    last = inf
    for entry in found[number:]:
        if entry["after"] < last:
            held.append(entry)
            lasts.append(last)
            last = entry["after"]
    own, *others = opened(held)
    datasets = [newest, *({name: group.to_dataset() for name, group in one.children.items()} for one in reversed([own, *others]))]
    sources = list(zip(datasets, [last, *reversed(lasts)], strict=True))
    groups = {name: _joined(name, group.to_dataset(), sources) for name, group in own.children.items()}
    attributes = {key: value for key, value in own.attrs.items() if key not in _NOT_THE_RUNS}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes | said), **groups})


def _joined(name: str, own: xr.Dataset, sources: Sequence[tuple[Mapping[str, xr.Dataset], float]]) -> xr.Dataset:
    """A group of a lineage, whose last part is `own`: it has the matrices and the variables that it had then."""
    parts = []
    for datasets, last in sources:
        if (dataset := datasets.get(name)) is not None and "step" in dataset.variables:
            count = int(np.searchsorted(dataset["step"].values, last, side="right"))
            parts.append(dataset.isel(step=slice(0, count), missing_dims="ignore"))
    parts = [part for part in parts if part.sizes["step"]] or [own]
    matrices = {"matrix": slice(0, own.sizes["matrix"])} if "matrix" in own.dims else {}
    variables = {}
    for key, variable in own.variables.items():
        if "step" in variable.dims:
            if not all(key in part.variables for part in parts):
                raise RunError("it is not in all lineages of the run", file=f"{name}/{key}")
            held = [part.variables[key] for part in parts]
            held = [one.isel({dim: at for dim, at in matrices.items() if dim in one.dims}) for one in held]
            if any(one.dims != variable.dims or one.shape[1:] != variable.shape[1:] or one.dtype != variable.dtype for one in held):
                raise RunError("it is of another kind in another lineage", file=f"{name}/{key}")
            variable = xr.Variable(variable.dims, indexing.LazilyIndexedArray(_Joined(held)), variable.attrs)
        variables[key] = variable
    coordinates = {key: variables[key] for key in own.coords}
    return xr.Dataset({key: v for key, v in variables.items() if key not in coordinates}, coordinates, own.attrs)


class _Joined(BackendArray):  # type: ignore[misc, unused-ignore]
    """Arrays one after the other along their first dimension, each read when used."""

    def __init__(self, parts: Sequence[xr.Variable]) -> None:
        self._parts = parts
        self.shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        records = np.arange(self.shape[0])[key[0]]
        chosen, start = np.atleast_1d(records), 0
        pieces: list[tuple[NDArray[np.intp], Any]] = []
        for part in self._parts:
            here = np.flatnonzero((chosen >= start) & (chosen < start + len(part)))
            if len(here) or not pieces:  # of the first in any case, for its shape
                pieces.append((here, part[(_as_slice(chosen[here] - start), *key[1:])].values))
            start += len(part)
        found = np.empty((len(chosen), *pieces[0][1].shape[1:]), self.dtype)
        for here, values in pieces:
            found[here] = values
        return found if np.ndim(records) else np.asarray(found[0])


def _as_slice(positions: NDArray[np.integer[Any]]) -> Any:
    """The same positions as a slice, which is read faster, where they are a run."""
    first, count = (int(positions[0]), len(positions)) if len(positions) else (0, 0)
    return slice(first, first + count) if np.array_equal(positions, np.arange(first, first + count)) else positions
