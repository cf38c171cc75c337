"""Reading back what is on disk, by Zarr: when a run is continued, and when it is laid out anew."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .record_group import Read
from .stored_array import StoredArray


def reader_of(root: Path) -> Read:
    """A function that reads arrays of the run at `root`: records (or elements) from one number to another.

    It raises ValueError where they are damaged.
    """

    import zarr
    from zarr.storage import LocalStore, StorePath

    def read(array: StoredArray, start: int, stop: int) -> NDArray[Any]:
        place = StorePath(LocalStore(root, read_only=True), array.path)
        stored: zarr.Array[Any] = zarr.Array(zarr.AsyncArray(array.document, place))  # type: ignore[call-overload]
        try:
            # Zarr takes a chunk without a file for one that never was.
            for number in array.committed() if array.has_steps else ():
                first = number // array.width * array.chunk[0]
                if first < stop and start < first + array.chunk[0]:
                    (root / array.file(number)).stat()
            return np.asarray(stored[start:stop])
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"store: {array.path} in {root} is damaged ({error}); `diag verify` tells where, and repairs") from error

    return read
