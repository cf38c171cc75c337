"""Arrays of a run as xarray's: read when used, a chunk at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from ..diagnostics.store.opening import ADVICE, labels
from ..diagnostics.store.reading import read
from ..diagnostics.store.root_document import Contents, Node
from ..diagnostics.store.run_error import RunError
from ..diagnostics.store.stored_array import StoredArray

_ADVICE = f"if the run was written to since it was opened, open it again, else {ADVICE}"


class LazyArray(BackendArray):  # type: ignore[misc, unused-ignore]
    """An array in a folder, for xarray to index."""

    def __init__(self, folder: Path, array: StoredArray) -> None:
        self.folder, self.array = folder, array
        self.shape, self.dtype = array.shape, array.in_memory

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        try:
            return read(self.folder, self.array, [np.arange(size)[k] for k, size in zip(key, self.shape, strict=True)])
        except RunError as error:
            raise error.told(place=self.folder, advice=_ADVICE) from error
        except OSError as error:
            raise RunError(f"cannot be read ({error})", place=self.folder, advice=_ADVICE) from error


class Run(BackendEntrypoint):
    """What opens a run for xarray, its contents being known."""

    supports_groups = True

    def open_datatree(self, filename_or_obj: Any, *, of: Contents, drop_variables: Any = None) -> xr.DataTree:  # type: ignore[override]
        """The tree of all groups.

        Raises:
            RunError: as :func:`labels`.
        """
        folder = Path(filename_or_obj)
        read = labels(folder, of)
        groups = {node.path: _dataset(folder, node, read) for node in of.groups}
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(of.attributes)), **groups})


def _dataset(folder: Path, node: Node, read: Mapping[str, NDArray[Any]]) -> xr.Dataset:
    """A group; steps and names have been `read`, by path."""
    variables = {
        name: xr.Variable(
            array.dimensions,
            read[array.path] if array.path in read else indexing.LazilyIndexedArray(LazyArray(folder, array)),
            dict(array.attributes),
            {"chunks": array.chunk},
        )
        for name, array in node.arrays.items()
    }
    attributes = dict(node.attributes)
    coordinates = {name for name, array in node.arrays.items() if array.dimensions == (name,) or not array.has_steps}
    for said in (attributes, *(variable.attrs for variable in variables.values())):
        said.pop("coordinates", None)  # where CF has the same be said, for other readers
    return xr.Dataset(
        {name: variable for name, variable in variables.items() if name not in coordinates},
        {name: variable for name, variable in variables.items() if name in coordinates},
        attributes,
    )
