"""Arrays of a run as xarray's: read when used, a chunk at a time."""

from collections.abc import Iterable
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from ..diagnostics.store.checked_array import StoredArray
from ..diagnostics.store.reading import read_chunks
from ..diagnostics.store.root_document import Contents, Node


class LazyArray(BackendArray):  # type: ignore[misc, unused-ignore]
    """An array in a folder, for xarray to index."""

    def __init__(self, folder: Path, array: StoredArray) -> None:
        self.folder, self.array = folder, array
        self.shape = array.shape
        self.dtype: np.dtype[Any] = np.dtypes.StringDType() if array.dtype is None else array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        try:
            found = read(self.folder, self.array, [np.arange(size)[k] for k, size in zip(key, self.shape, strict=True)])
        except (OSError, ValueError) as error:
            raise ValueError(f"run: {self.folder}: {error}; `diag verify` tells what is whole") from error
        return found


def read(folder: Path, array: StoredArray, positions: Iterable[Any]) -> Any:
    """The elements at chosen positions of each dimension; a number instead of several takes the dimension away."""
    given = list(positions)
    chosen = [np.atleast_1d(p) for p in given]
    out = array.empty(tuple(map(len, chosen)))
    places = [_places(p, length) for p, length in zip(chosen, array.chunk, strict=True)]
    per_file = [outer // inner for outer, inner in zip(array.shard, array.chunk, strict=True)]
    # By dimension and file: the chunks in it that are wanted.
    files = [_by_file(where, n) for where, n in zip(places, per_file, strict=True)]
    for numbers in array.files_among(files):
        wanted = list(product(*(held[number] for held, number in zip(files, numbers, strict=True))))
        inner = [tuple(n % f for n, f in zip(one, per_file, strict=True)) for one in wanted]
        for one, chunk in zip(wanted, read_chunks(folder, array, numbers, inner), strict=True):
            if chunk is not None:
                there, here = zip(*(where[number] for where, number in zip(places, one, strict=True)), strict=True)
                out[_grid(there)] = chunk[_grid(here)]
    return out[tuple(0 if np.ndim(p) == 0 else slice(None) for p in given)]


def _by_file(chunks: Iterable[int], per_file: int) -> dict[int, list[int]]:
    return {number: list(held) for number, held in groupby(chunks, key=lambda n: n // per_file)}


def _places(positions: NDArray[Any], length: int) -> dict[int, tuple[NDArray[Any], NDArray[Any]]]:
    """Along a dimension, by the number of the chunk, ascending: which of the chosen positions lie in it, and where in it."""
    numbers = positions // length
    order = np.argsort(numbers, kind="stable")
    found, starts = np.unique(numbers[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {int(number): (part, positions[part] - number * length) for number, part in zip(found, parts, strict=False)}


def _grid(places: tuple[NDArray[Any], ...]) -> tuple[Any, ...]:
    """An index for all combinations; slices, which are faster, where they are all runs."""
    runs = [np.array_equal(p, np.arange(p[0], p[0] + len(p))) for p in places]
    return tuple(slice(p[0], p[0] + len(p)) for p in places) if all(runs) else np.ix_(*places)


class Run(BackendEntrypoint):
    """What opens a run for xarray, its contents being known."""

    supports_groups = True

    def open_datatree(self, filename_or_obj: Any, *, of: Contents, drop_variables: Any = None) -> xr.DataTree:  # type: ignore[override]
        """The tree of all groups."""
        groups = {node.path: _dataset(Path(filename_or_obj), node) for node in of.groups}
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(of.attributes)), **groups})


def _dataset(folder: Path, node: Node) -> xr.Dataset:
    variables = {
        name: xr.Variable(
            array.dimensions, indexing.LazilyIndexedArray(LazyArray(folder, array)), dict(array.attributes), {"chunks": array.chunk}
        )
        for name, array in node.arrays.items()
    }
    attributes = dict(node.attributes)
    coordinates = {name for name, array in node.arrays.items() if array.dimensions == (name,) or "step" not in array.dimensions}
    for said in (attributes, *(variable.attrs for variable in variables.values())):
        said.pop("coordinates", None)  # where CF has the same be said, for other readers
    if "step" in variables:
        steps = variables["step"].load().values
        if len(steps) and not (steps[0] >= 0 and (steps[1:] > steps[:-1]).all()):
            raise ValueError(
                f"run: {folder}: {node.path}/step: expected steps in ascending order from 0 on, got others; `diag verify` tells what is whole"
            )
    if "name" in variables and "matrix" in variables["name"].dims:
        variables["name"].load()  # as many as the metadata say
    return xr.Dataset(
        {name: variable for name, variable in variables.items() if name not in coordinates},
        {name: variable for name, variable in variables.items() if name in coordinates},
        attributes,
    )
