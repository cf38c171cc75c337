"""The records of one group: the rows of the chunk that is not yet full stay in memory, so that a flush reads nothing back."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .files import Files
from .laying_out import is_for_writing
from .open_array import OpenArray
from .reading import read_rows
from .stored_array import StoredArray, new_array

Row: TypeAlias = Mapping[str, NDArray[Any] | float]

CHUNK_STEPS = 64
SCALAR_CHUNK_STEPS = 1024


def steps_array(group: str, separator: str = "/") -> StoredArray:
    """The steps of a group that has no records yet."""
    texts = {"long_name": "optimizer steps taken", "units": "1"}
    made = new_array(f"{group}/step", (0,), ("step",), np.dtype("int64"), -1, (SCALAR_CHUNK_STEPS,), texts)
    return replace(made, separator=separator)


class RecordGroup:
    """One group of a run.

    Attributes:
        arrays: those along `step`, by name.
        static: the others.
        steps: of all records, committed or not.
        committed: how many records are.
    """

    # What belongs together is assigned in one statement, within which no signal handler runs: one that raises leaves it as before or as after.

    def __init__(self, folder: Path, path: str, arrays: Mapping[str, OpenArray], steps: list[int]) -> None:
        """The group at `path` of the run in `folder`, of which `steps` are committed."""
        self.folder, self.path = folder, path
        self.arrays = {name: array for name, array in arrays.items() if array.stored.has_steps}
        self.static = {name: array for name, array in arrays.items() if not array.stored.has_steps}
        self.chunk_steps = SCALAR_CHUNK_STEPS if path.rpartition("/")[2] == "scalars" else CHUNK_STEPS
        self.steps = steps
        self.committed = len(steps)
        self._changed = len(steps)  # the first record that is not on disk as it is here
        self._start = len(steps)  # number of the first of `_rows`
        self._rows: list[Row] = []

    def read_back(self) -> None:
        """Read the chunk of the last record, which a further one may have to be written into.

        Raises:
            RunError: it is damaged; told without the run.
        """
        if self.steps:
            self._reach_back(len(self.steps) - 1)

    def chunk_steps_of(self, name: str) -> int:
        """For how many records a chunk of one of its arrays is."""
        return SCALAR_CHUNK_STEPS if name == "step" else self.chunk_steps

    def lies_for_writing(self, name: str) -> bool:
        """Whether one of its arrays lies as this version writes it."""
        array = self.static.get(name) or self.arrays[name]
        return is_for_writing(array.stored, self.chunk_steps_of(name))

    @property
    def pending(self) -> bool:
        """Whether it has records that are not on disk as they are here."""
        return self._changed < len(self.steps)

    def append(self, step: int, row: Row) -> bool:
        """Take a record, true where it ends a chunk; a further one of the last step is merged with it, so that steps stay unique."""
        # An exception of a signal handler may have cut off the last time, the row being there and its step not.
        del self._rows[len(self.steps) - self._start :]
        if self.steps and self.steps[-1] == step:
            self._reach_back(len(self.steps) - 1)
            self._changed = min(self._changed, len(self.steps) - 1)
            self._rows[-1] = {**self._rows[-1], **row}
        else:
            self._rows.append(row)
            self.steps.append(step)
        return len(self.steps) % self.chunk_steps == 0

    def trim(self) -> list[int]:
        """Drop the oldest records that are not committed beyond 4 chunks of them; their steps."""
        excess = max(0, len(self.steps) - self.committed - 4 * self.chunk_steps)
        dropped = self.steps[self.committed : self.committed + excess]
        if dropped:
            first = self.committed - self._start
            del self._rows[first : first + excess], self.steps[self.committed : self.committed + excess]
        return dropped

    def write(self, files: Files, count: int) -> None:
        """Write the chunks that hold records from the first changed one up to `count`."""
        if self._changed >= count:
            return
        self._reach_back(self._changed)
        # Steps last: where they are, all else of their records is, which is what a lost root is made again from.
        for name, array in sorted(self.arrays.items(), key=lambda item: item[0] == "step"):
            length = array.stored.shard[0]
            for chunk in range(self._changed // length, -(-count // length)):
                array.write(files, chunk, self._block(name, array, chunk * length, min(count, (chunk + 1) * length)))

    def settle(self, count: int) -> bool:
        """`count` records are committed: rows of full chunks are let go; whether there were any."""
        self.committed = self._changed = count
        full = count - count % self.chunk_steps
        let_go = full - self._start
        if let_go > 0:
            self._rows, self._start = self._rows[let_go:], full
        return let_go > 0

    def cut(self, count: int) -> None:
        """Have so many records only, all of which are committed; chunks of others stay until they are written over."""
        del self.steps[count:]
        self.committed = self._changed = self._start = count
        self._rows = []

    def declare(self, count: int) -> None:
        """Give all arrays the length of so many records."""
        for array in self.arrays.values():
            array.resize((count, *array.stored.shape[1:]))

    def _block(self, name: str, array: OpenArray, start: int, stop: int) -> NDArray[Any]:
        if name == "step":
            return np.array(self.steps[start:stop])
        block = array.stored.empty((stop - start, *array.stored.shape[1:]))
        for i, row in enumerate(self._rows[start - self._start : stop - self._start]):
            if name in row:
                value = np.asarray(row[name])
                within: tuple[int | slice, ...] = (i, *(slice(size) for size in value.shape))
                block[within] = value  # a row may be from before matrices were added
        return block

    def _reach_back(self, record: int) -> None:
        """Have the rows from the start of this record's chunk on, read back where they were let go or written by another writer."""
        start = record - record % self.chunk_steps
        if self._start > start:
            stop = self._start
            read = {name: read_rows(self.folder, array.to_read(), start, stop) for name, array in self.arrays.items() if name != "step"}
            before: list[Row] = [{name: values[i] for name, values in read.items()} for i in range(stop - start)]
            self._rows, self._start = before + self._rows, start
