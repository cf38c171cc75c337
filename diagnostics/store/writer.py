"""The store on the writing side: one Zarr v3 group per run, appended in whole chunks, committed by one atomic write.

The commit rule (`docs/store.md`). Chunks of a flush are written first. Then the root's document, which carries the metadata
of every array, is replaced by one rename. Readers that open the run through it (plain xarray does) see either all arrays
of a flush or none; what a killed process wrote after the last commit lies outside every committed shape, and the next
writer removes it or writes over it.
"""

from collections.abc import Iterable, Mapping
from math import inf
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ..catalogue import SCHEMA
from .continuing import clear, committed, nothing_or_a_run, refusing, tidy
from .files import Files, remove_chunks
from .format import LINEAGES
from .laying_out import AT_ONCE, SHARD_STEPS, for_reading, for_writing, lay_out
from .lineages import leave
from .lock import RunLock
from .open_array import OpenArray
from .reading import read_all
from .record_group import CHUNK_STEPS, SCALAR_CHUNK_STEPS, RecordGroup, Row, steps_array
from .root_document import group_document, nodes_of, read_document, root_document
from .stored_array import new_array

__all__ = ["CHUNK_STEPS", "SCALAR_CHUNK_STEPS", "Row", "TakenOver", "Writer"]


class TakenOver(RuntimeError):
    """Another writer has taken the run over."""


class Writer:
    """Appends records to one run. Rows are buffered until :meth:`flush`; :attr:`committed` counts those on disk per group."""

    def __init__(self, path: str | Path, attributes: Mapping[str, Any], lock: RunLock | None = None, *, lay_out: bool = True) -> None:
        """Open the run at `path`, making it with `attributes` if nothing is there; `lock` is kept until :meth:`release`.

        One that was compacted is laid out for writing; without `lay_out`, only as far as records come.

        Raises:
            RunError: `path` holds something else, a run of another schema version, or one that is damaged; nothing of it has changed then.
        """
        self._lock = lock
        self.path = Path(path)
        self.is_new = nothing_or_a_run(self.path)
        own = uuid4().hex
        self._files = Files(self.path.resolve(), own)  # what is read back is to be read through no link
        self._groups: dict[str, RecordGroup] = {}
        self._coordinates: dict[str, NDArray[Any]] = {}  # values of static coordinates, by path
        self._nodes: dict[str, dict[str, Any]] = {}  # metadata of all nodes but the root, as last committed
        self._documents: dict[str, dict[str, Any]] = {}  # the same, as last written to their own files
        self._full_chunks = False  # in the last commit
        self._last_seen: tuple[int, int, int] | None = None  # what tells the root's document as this writer left it
        # Attributes by group, "" the run's own: changed in memory, written by the next commit.
        self.attributes: dict[str, dict[str, Any]] = {}
        if self.is_new:
            self._begin(attributes)
        else:
            self._adopt(lay_out)
        self._writers = (self.attributes[""].get("writer"), own)  # whoever wrote last, and this one
        self.attributes[""]["writer"] = own

    def _begin(self, attributes: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        clear(self._files)
        self.attributes[""] = {"optiscope_schema": SCHEMA, **attributes}
        self._files.replace_document("", group_document(self.attributes[""]))

    def _adopt(self, lay_out: bool) -> None:
        """Take over what is committed, and lay it out for writing. What an earlier version made is laid out anew in any case."""
        with refusing(self.path):
            self.attributes, self._groups, self._coordinates = committed(self.path)
        earlier = self.attributes[""]["optiscope_schema"] != SCHEMA
        tidy(self._files, self._groups.values(), len(self.attributes[""].get(LINEAGES, [])), everywhere=earlier)
        self.attributes[""]["optiscope_schema"] = SCHEMA
        if lay_out or earlier:
            self._lay_out_for_writing(self._groups, all_anew=earlier)

    def _lay_out_for_writing(self, groups: Iterable[str], *, all_anew: bool = False) -> None:
        """Arrays of these groups that were compacted, or made by another version; with `all_anew` all of them, by one commit."""
        found = (
            (arrays, name, for_writing(array.stored, group.chunk_steps_of(name)))
            for group in map(self._groups.__getitem__, groups)
            for arrays in (group.static, group.arrays)
            for name, array in arrays.items()
            if all_anew or not group.lies_for_writing(name)
        )
        with refusing(self.path):
            lay_out(self._files, found, self._commit_as_it_is, self._let_go, inf if all_anew else AT_ONCE)

    def _commit_as_it_is(self) -> None:
        self._commit({name: group.committed for name, group in self._groups.items()})

    def _let_go(self, arrays: Iterable[OpenArray]) -> None:
        """Remove the chunks of arrays that have been laid out anew, after their own documents say so."""
        self._write_documents(self._nodes)
        for array in arrays:
            remove_chunks(self._files, array.stored.path, array.stored.separator)

    def create_group(self, name: str, coordinates: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]) -> None:
        """Add a group of records with static coordinates along `matrix` (and `quantile`, where two-dimensional).

        Coordinates along other dimensions are added by :meth:`create_coordinate`.

        Raises:
            TakenOver: as in :meth:`flush`.
        """
        self._check_ours()
        self._files.remove(name)
        # Read by xarray as the names of its non-index coordinates.
        declared = {"coordinates": " ".join(coordinates)} if coordinates else {}
        self.attributes[name] = {**attributes, **declared}
        for known in [path for path in self._documents if path == name or path.startswith(f"{name}/")]:
            del self._documents[known]
        static = {key: self._create_static(f"{name}/{key}", values, ("matrix", "quantile")) for key, values in coordinates.items()}
        self._groups[name] = RecordGroup(self.path.resolve(), name, {**static, "step": OpenArray(steps_array(name))}, [])

    def extend_group(self, name: str, coordinates: Mapping[str, NDArray[Any]]) -> None:
        """Add matrices to a group; earlier records hold missing values for them.

        A reader goes on seeing the committed shapes, and no value within them changes, until the next commit.

        Raises:
            TakenOver: as in :meth:`flush`.
        """
        self._check_ours()
        group = self._groups[name]
        added = {key: np.concatenate([self._values(group.static[key]), values]) for key, values in coordinates.items()}
        count = len(next(iter(coordinates.values())))
        shapes = {key: array.stored.shape for key, array in group.static.items()}
        try:
            for key, values in added.items():
                group.static[key].resize(values.shape)
                group.static[key].write_whole(self._files, values)
        except BaseException:
            # All or none: the next commit takes every array at the length it then has.
            for key, shape in shapes.items():
                group.static[key].resize(shape)
            raise
        self._coordinates.update({f"{name}/{key}": values for key, values in added.items()})
        for array in group.arrays.values():
            first, *rest = array.stored.shape
            if rest:
                array.resize((first, rest[0] + count, *rest[1:]))

    def create_coordinate(self, group: str, name: str, values: NDArray[Any]) -> None:
        """Add a static coordinate along the dimension of its own name."""
        self._groups[group].static[name] = self._create_static(f"{group}/{name}", values, (name,))

    def create_array(
        self,
        group: str,
        name: str,
        shape: tuple[int, ...],
        dimensions: tuple[str, ...],
        dtype: str,
        attributes: Mapping[str, Any],
        missing: float = float("nan"),
    ) -> None:
        """Add a variable of `shape` and `dimensions` after `step`; `missing` for records already there."""
        path, records = f"{group}/{name}", self._groups[group]
        self._files.remove(path)  # a writer that was killed may have left one
        self._documents.pop(path, None)
        made = new_array(
            path, (records.committed, *shape), ("step", *dimensions), np.dtype(dtype), missing, (records.chunk_steps, *shape), attributes
        )
        records.arrays[name] = OpenArray(made)

    def coordinate(self, group: str, name: str) -> list[Any]:
        """A static coordinate of a group, as a list."""
        return list(self._values(self._groups[group].static[name]))

    def has(self, group: str, name: str | None = None) -> bool:
        """Whether the run has the group, or the group the variable."""
        found = self._groups.get(group)
        return found is not None and (name is None or name in found.arrays or name in found.static)

    @property
    def committed(self) -> dict[str, int]:
        """How many records are on disk, by group."""
        return {name: group.committed for name, group in self._groups.items()}

    @property
    def bytes_written(self) -> int:
        """How much was written, for what it costs."""
        return self._files.bytes_written

    @property
    def last_step(self) -> int:
        """Largest step of any record, committed or pending; 0 for an empty run."""
        return max((group.steps[-1] for group in self._groups.values() if group.steps), default=0)

    def append(self, group: str, step: int, row: Row) -> bool:
        """Buffer one record; true when the group's buffer now ends a chunk and is best flushed.

        A further row of the group's last step is merged with the one there, so that steps stay unique.
        """
        records = self._groups[group]
        if any(array.stored.sharded for array in records.arrays.values()):  # one that comes after `close`
            self._check_ours()
            self._lay_out_for_writing([group])
        return records.append(step, row)

    def trim(self) -> list[int]:
        """Drop the oldest of what is buffered beyond 4 chunks a group, for a store that cannot be written; the step of each record, not of scalars alone."""
        return [step for name, group in self._groups.items() for step in group.trim() if name != "scalars"]

    @property
    def unwritten(self) -> set[int]:
        """Steps of the records that are not committed; those of scalars alone do not count."""
        return {step for name, group in self._groups.items() if name != "scalars" for step in group.steps[group.committed :]}

    def flush(self) -> None:
        """Write what is buffered and commit it. Where that fails, nothing is committed and the buffer is kept.

        Raises:
            TakenOver: another writer has committed to the run since; going on would undo what it committed.
        """
        self._check_ours()
        if self._full_chunks:
            self._write_documents(self._nodes)
        counts = {name: len(group.steps) for name, group in self._groups.items()}
        for name, count in counts.items():
            self._groups[name].write(self._files, count)
        self._commit(counts)
        # A list: all are told.
        self._full_chunks = any([self._groups[name].settle(count) for name, count in counts.items()])

    def close(self) -> None:
        """Flush, and leave every array's own metadata as the run's."""
        self.flush()
        self._write_documents(self._nodes)

    def lay_out_for_reading(self) -> int:
        """Flush, then compact what has many records: where that is cut off, each array is whole in one form or the other.

        Returns:
            How many arrays were compacted.

        Raises:
            RunError: an array is damaged; it stays as it is.
            TakenOver: as in :meth:`flush`.
        """
        if any(group.pending for group in self._groups.values()):
            self.flush()  # rows that wait are for the chunks that there are now
        found = [
            (group.arrays, name, for_reading(array.stored))
            for group in self._groups.values()
            for name, array in group.arrays.items()
            if group.committed > SHARD_STEPS and len(array.stored.shape) > 1 and not array.stored.sharded
        ]
        with refusing(self.path):
            lay_out(self._files, found, self._commit_as_it_is, self._let_go, AT_ONCE)
        return len(found)

    def leave(self, number: int, attributes: Mapping[str, Mapping[str, Any]], after: int) -> dict[str, int]:
        """Copy the records after step `after` into lineage `number`, which no commit knows yet, with the attributes that it is to have.

        Returns:
            What the run is to say of it.

        Raises:
            RunError: one of them is damaged; nothing has changed then.
            TakenOver: as in :meth:`flush`.
        """
        self._check_ours()
        if any(group.pending for group in self._groups.values()):
            self.flush()
        with refusing(self.path):
            return leave(self._files, number, self._groups, attributes, after)

    def cut(self, after: int) -> None:
        """Have the records up to step `after` alone, all of which are committed, from the next commit on."""
        for group in self._groups.values():
            group.cut(sum(step <= after for step in group.steps))

    def _commit(self, counts: Mapping[str, int]) -> None:
        """Replace the root's document by one with so many records in each group."""
        for name, count in counts.items():
            self._groups[name].declare(count)
        nodes = nodes_of(self.attributes, self._groups)
        # Of nodes that are new; those of others follow now and then, for nothing but the root's document is needed to read.
        self._write_documents({path: node for path, node in nodes.items() if path not in self._documents})
        self._files.replace_document("", root_document(self.attributes[""], nodes, self._groups))
        self._last_seen = self._files.signature()
        self._nodes = nodes

    def _write_documents(self, nodes: Mapping[str, dict[str, Any]]) -> None:
        """Write the nodes' own documents, where they differ from what is there."""
        for path, node in nodes.items():
            if self._documents.get(path) != node:
                self._files.replace_document(path, node)
                self._documents[path] = node

    def _check_ours(self) -> None:
        # Whoever else writes puts another file into its place.
        if self._last_seen is not None and self._files.signature() == self._last_seen:
            return
        if read_document(self.path.resolve())["attributes"].get("writer") not in self._writers:
            raise TakenOver(f"{self.path} is now written by another recorder")

    def release(self) -> None:
        """Give the lock of the run back, where it was given one: another recorder may write."""
        if self._lock is not None:
            self._lock.release()

    def _values(self, array: OpenArray) -> NDArray[Any]:
        """Of a static coordinate."""
        path = array.stored.path
        if path not in self._coordinates:
            self._coordinates[path] = read_all(self.path.resolve(), array.to_read())
        return self._coordinates[path]

    def _create_static(self, path: str, values: NDArray[Any], dimensions: tuple[str, ...]) -> OpenArray:
        self._files.remove(path)  # a writer that was killed may have left one
        shape = values.shape
        fill: Any = "" if values.dtype.kind == "T" else values.dtype.type(0).item()
        array = OpenArray(new_array(path, shape, dimensions[: len(shape)], values.dtype, fill, shape, {}))
        array.write_whole(self._files, values)
        self._coordinates[path] = values
        return array
