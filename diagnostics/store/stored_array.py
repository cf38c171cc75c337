"""An array of a run: what it is, which files it lies in, and where in them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bounds import MAX_TEXT


@dataclass(frozen=True)
class StoredArray:
    """An array as its metadata describe it.

    Attributes:
        path: within the run: "geometry/fro_norm".
        shape: committed.
        dimensions: a name for each.
        dtype: little-endian; None for texts.
        fill: what stands where no chunk is.
        attributes: texts for readers.
        chunk: shape of what is decoded at once.
        shard: shape of what one file holds.
        sharded: whether a file holds an index after its chunks, be it one chunk; else it is one chunk.
        compression: "blosc", "zstd" or None.
        checksum: CRC-32C after each chunk.
        separator: of the numbers in a chunk's key.
        written: numbers of the files that there must be, in the row-major order of their grid; None where that is not known.
    """

    path: str
    shape: tuple[int, ...]
    dimensions: tuple[str, ...]
    dtype: np.dtype[Any] | None
    fill: Any
    attributes: Mapping[str, Any]
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    sharded: bool
    compression: str | None
    checksum: bool
    separator: str
    written: Collection[int] | None

    @property
    def name(self) -> str:
        """Within its group."""
        return self.path.rpartition("/")[2]

    @property
    def has_steps(self) -> bool:
        """Whether it gets longer with every record; such arrays have `step` as their first dimension."""
        return "step" in self.dimensions

    @property
    def in_memory(self) -> np.dtype[Any]:
        """The type of its values when they are read."""
        return np.dtypes.StringDType() if self.dtype is None else self.dtype

    @property
    def grid(self) -> tuple[int, ...]:
        """Files along each dimension."""
        return tuple(-(-size // length) for size, length in zip(self.shape, self.shard, strict=True))

    @property
    def width(self) -> int:
        """How many files lie beside each other in all dimensions but the first."""
        return prod(self.grid[1:])

    @property
    def per_file(self) -> tuple[int, ...]:
        """Chunks in a file, along each dimension."""
        return tuple(outer // inner for outer, inner in zip(self.shard, self.chunk, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk; of texts the most that one may have, so that all of an array's are bounded."""
        return MAX_TEXT // max(prod(self.grid), 1) if self.dtype is None else prod(self.chunk) * self.dtype.itemsize

    def key(self, numbers: tuple[int, ...]) -> str:
        """The file of a chunk or shard, within the run."""
        return f"{self.path}/{self.separator.join(map(str, ('c', *numbers)))}"

    def numbers(self, file: str) -> tuple[int, ...] | None:
        """Of a chunk or shard by its file, as :meth:`key` names it; None where the file is none that the array can have."""
        numbers = file.removeprefix(f"{self.path}/c").replace(".", "/").strip("/").split("/")
        if len(numbers) != len(self.shape) or not all(number.isdecimal() and len(number) < 10 for number in numbers):
            return None
        found = tuple(map(int, numbers))
        return found if self.key(found) == file and all(n < size for n, size in zip(found, self.grid, strict=True)) else None

    def place(self, numbers: tuple[int, ...]) -> int:
        """The number of a file in the row-major order of their grid, by which the map of chunks knows it."""
        return int(np.ravel_multi_index(numbers, self.grid))

    def numbers_at(self, place: int) -> tuple[int, ...]:
        """The opposite of :meth:`place`; of a file after the last record too."""
        row, column = divmod(place, self.width)
        return (row, *map(int, np.unravel_index(column, self.grid[1:]))) if len(self.shape) > 1 else (row,)

    def expects(self, numbers: tuple[int, ...]) -> bool:
        """Whether the file must be there. Steps are never missing; of all else, that is known by the map of chunks alone."""
        if self.written is None:
            return self.path.endswith("/step")
        return self.place(numbers) in self.written

    def files_among(self, along: Sequence[Collection[int]]) -> Iterator[tuple[int, ...]]:
        """Of the files whose numbers along each dimension are given, those that may be there; what was not written holds missing values alone."""
        if self.written is None or prod(map(len, along)) <= len(self.written):
            for numbers in product(*along):
                if self.written is None or self.expects(numbers):
                    yield numbers
            return
        for number in sorted(self.written):
            numbers = self.numbers_at(number)
            if all(n in given for n, given in zip(numbers, along, strict=True)):
                yield numbers

    def files(self) -> Iterator[tuple[int, ...]]:
        """All files that may be there."""
        return self.files_among(list(map(range, self.grid)))

    def empty(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array of `shape` in which everything is missing."""
        return np.full(shape, self.fill, self.in_memory)


def new_array(
    path: str,
    shape: Sequence[int],
    dimensions: Sequence[str],
    dtype: np.dtype[Any],
    missing: Any,
    chunk: Sequence[int],
    attributes: Mapping[str, Any],
) -> StoredArray:
    """An array as this version writes it: each chunk a file, compressed, with a checksum; nothing of it is on disk."""
    held = None if dtype.kind == "T" else dtype.newbyteorder("<")
    fill = missing if held is None else held.type(missing)
    lengths = tuple(max(size, 1) for size in chunk)
    return StoredArray(
        path, tuple(shape), tuple(dimensions), held, fill, dict(attributes), lengths, lengths, False, "blosc", True, "/", None
    )
