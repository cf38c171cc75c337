"""One array of a run on the writing side: its metadata document, and its chunks as files."""

from collections.abc import Iterable
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codecs import all_missing, encode, encode_shard
from .files import Files


class StoredArray:
    """An array at `path` below the run.

    Attributes:
        document: its metadata, as the next commit writes it.
        on_disk: numbers of its chunks that have a file; chunks are counted in row-major order of their grid.
    """

    def __init__(self, path: str, document: dict[str, Any], on_disk: Iterable[int] = ()) -> None:
        self.path = path
        self.document = document
        self.on_disk = set(on_disk)
        text = document["data_type"] == "string"
        self.dtype: np.dtype[Any] = np.dtypes.StringDType() if text else np.dtype(document["data_type"])
        fill = document["fill_value"]
        self.missing = fill if text else self.dtype.type(float(fill) if isinstance(fill, str) else fill)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.document["shape"])

    @property
    def chunk(self) -> tuple[int, ...]:
        return tuple(self.document["chunk_grid"]["configuration"]["chunk_shape"])

    @property
    def inner(self) -> tuple[int, ...] | None:
        """Shape of the chunks within a shard, None where chunks are files."""
        first = self.document["codecs"][0]
        return tuple(first["configuration"]["chunk_shape"]) if first["name"] == "sharding_indexed" else None

    @property
    def separator(self) -> str:
        """Between the parts of a chunk's key."""
        return str(self.document["chunk_key_encoding"]["configuration"]["separator"])

    @property
    def has_steps(self) -> bool:
        return "step" in self.document["dimension_names"]

    @property
    def width(self) -> int:
        """How many chunks lie beside each other in all dimensions but the first."""
        return prod(ceil(size / chunk) for size, chunk in zip(self.shape[1:], self.chunk[1:], strict=True))

    def resize(self, shape: tuple[int, ...]) -> None:
        """Declare another shape; the numbers of the chunks follow."""
        before = self.width
        self.document = {**self.document, "shape": list(shape)}
        if self.width != before:
            self.on_disk = {number // before * self.width + number % before for number in self.on_disk}

    def committed(self) -> list[int]:
        """Numbers of the chunks within the shape that have a file."""
        count = ceil(self.shape[0] / self.chunk[0]) * self.width
        return [number for number in self.on_disk if number < count]

    def files_there(self, files: Files) -> set[int]:
        """Numbers of the chunks within the shape that have a file, by looking."""
        count = ceil(self.shape[0] / self.chunk[0]) * self.width
        return {number for number in range(count) if (files.root / self.file(number)).exists()}

    def file(self, number: int) -> str:
        """Where a chunk's file is, below the run."""
        beside = [ceil(size / chunk) for size, chunk in zip(self.shape[1:], self.chunk[1:], strict=True)]
        row, column = divmod(number, self.width)
        index = (row, *np.unravel_index(column, beside)) if beside else (row,)
        return f"{self.path}/{self.separator.join(('c', *map(str, index)))}"

    def empty(self, rows: int) -> NDArray[Any]:
        """Missing values, so many along the first dimension."""
        return np.full((rows, *self.shape[1:]), self.missing, dtype=self.dtype)

    def write(self, files: Files, row: int, block: NDArray[Any], *, always: bool = False) -> None:
        """Write the chunks of one row of the grid, from a block of a chunk's length. Those of missing values alone have no file, but `always`."""
        for column, place in enumerate(product(*(range(ceil(s / c)) for s, c in zip(self.shape[1:], self.chunk[1:], strict=True)))):
            number = row * self.width + column
            part = block[(slice(None), *(slice(i * c, (i + 1) * c) for i, c in zip(place, self.chunk[1:], strict=True)))]
            # A file that is there is written over even so: a writer that was killed, or whose disk was full, may have left it.
            if not always and number not in self.on_disk and all_missing(part, self.missing):
                continue
            if part.shape != self.chunk:
                padded = np.full(self.chunk, self.missing, dtype=self.dtype)
                padded[tuple(slice(size) for size in part.shape)] = part
                part = padded
            self.on_disk.add(number)
            files.replace(self.file(number), encode_shard(part, self.inner, self.missing) if self.inner else [encode(part)])

    def write_whole(self, files: Files, values: NDArray[Any]) -> None:
        """Write all chunks of an array that has one dimension, or one chunk."""
        length = self.chunk[0]
        for start in range(0, len(values), length):
            block = self.empty(length)
            part = values[start : start + length]
            block[: len(part)] = part
            self.write(files, start // length, block, always=True)
