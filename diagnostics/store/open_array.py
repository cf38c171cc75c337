"""An array that a writer has open: it gets longer, and its chunks become files."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .array_metadata import array_document
from .codecs import all_missing, encode, encode_shard
from .files import Files
from .stored_array import StoredArray


class OpenArray:
    """An array of a run on the writing side.

    Attributes:
        stored: what it is; which of its chunks there are is told by `on_disk` alone.
        on_disk: numbers of the chunks that have a file, those of no commit yet included, in row-major order of their grid.
        document: its metadata, as the next commit writes it.
    """

    def __init__(self, stored: StoredArray, on_disk: Iterable[int] = ()) -> None:
        self.stored = stored
        self.on_disk = set(on_disk)
        self.document = array_document(stored)

    def resize(self, shape: tuple[int, ...]) -> None:
        """Declare another shape; the numbers of the chunks follow."""
        before, stored = self.stored.width, replace(self.stored, shape=shape)
        moved = {n // before * stored.width + n % before for n in self.on_disk} if stored.width != before else self.on_disk
        self.stored, self.on_disk, self.document = stored, moved, {**self.document, "shape": list(shape)}

    def committed(self) -> list[int]:
        """Numbers of the chunks within the shape that have a file."""
        count = prod(self.stored.grid)
        return [number for number in self.on_disk if number < count]

    def to_read(self) -> StoredArray:
        """The array as a reader has it, who knows which chunks must be there."""
        return replace(self.stored, written=frozenset(self.committed()))

    def write(self, files: Files, row: int, block: NDArray[Any], *, always: bool = False) -> None:
        """Write the chunks of one row of the grid, from a block of at most a chunk's length. Those of missing values alone have no file, but `always`."""
        stored = self.stored
        for column, place in enumerate(product(*map(range, stored.grid[1:]))):
            number = row * stored.width + column
            part = block[(slice(None), *(slice(i * c, (i + 1) * c) for i, c in zip(place, stored.shard[1:], strict=True)))]
            # A file that is there is written over even so: a writer that was killed, or whose disk was full, may have left it.
            if not always and number not in self.on_disk and all_missing(part, stored.fill):
                continue
            if part.shape != stored.shard:
                padded = stored.empty(stored.shard)
                padded[tuple(slice(size) for size in part.shape)] = part
                part = padded
            part = part.astype(stored.in_memory, copy=False)
            self.on_disk.add(number)
            files.replace(stored.key((row, *place)), encode_shard(part, stored.chunk, stored.fill) if stored.sharded else [encode(part)])

    def write_whole(self, files: Files, values: NDArray[Any]) -> None:
        """Write all chunks of an array that has one dimension, or one chunk."""
        length = self.stored.shard[0]
        for start in range(0, len(values), length):
            self.write(files, start // length, values[start : start + length], always=True)


def files_there(folder: Path, array: StoredArray) -> set[int]:
    """Numbers of the chunks within the shape that have a file, by looking."""
    return {array.place(numbers) for numbers in product(*map(range, array.grid)) if (folder / array.key(numbers)).exists()}
