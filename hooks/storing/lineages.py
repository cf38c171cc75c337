"""What trainings left that were restarted from a checkpoint: records copied aside, until one commit takes them from where they were.

Neither a lineage that was left nor its metadata changes any more (docs/store.md has the layout).
"""

from collections.abc import Mapping
from typing import Any

from ...diagnostics.run_format import chunk_map
from .encoding import array_document
from .files import Files
from .record_group import Read, RecordGroup
from .stored_array import StoredArray

LEFT = "lineages"


def is_left(path: str) -> bool:
    """Whether a node is that of a lineage that was left."""
    return path.partition("/")[0] == LEFT


class Lineages:
    """The lineages of a run that were left.

    Attributes:
        nodes: metadata of their groups and arrays, by path.
        chunks: which chunks of their arrays were written, by path.
    """

    def __init__(self, files: Files) -> None:
        """Those that are committed in the run; what a writer that was killed had copied and not committed is removed."""
        self._files = files
        root = files.document("")
        found = root.get("consolidated_metadata", {}).get("metadata", {})
        self.nodes: dict[str, dict[str, Any]] = {path: node for path, node in found.items() if is_left(path)}
        self.chunks: dict[str, str] = {path: mask for path, mask in root["attributes"].get("chunks", {}).items() if is_left(path)}
        folder = files.root / LEFT
        for entry in list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
            if entry.name.isdecimal() and f"{LEFT}/{entry.name}" not in self.nodes:
                files.remove(f"{LEFT}/{entry.name}")

    def __len__(self) -> int:
        return sum(path.count("/") == 1 for path in self.nodes)

    def leave(self, groups: Mapping[str, RecordGroup], attributes: Mapping[str, Mapping[str, Any]], after: int, read: Read) -> None:
        """Copy the records behind step `after` into a lineage, which the next commit makes part of the run. The groups stay as they are.

        Args:
            groups: all groups of records, each record of theirs committed, by name.
            attributes: of the run (under "") and of its groups; a lineage has them as they were when it was left.
            after: a step that some record is behind.
            read: reads an array.
        """
        base = f"{LEFT}/{len(self)}"
        self._files.remove(base)
        moved = {name: sum(step > after for step in group.steps) for name, group in groups.items()}
        last = max(group.steps[-1] for group in groups.values() if group.steps)
        nodes = {LEFT: _group({}), base: _group({**attributes[""], "after": after, "last_step": last, "records": max(moved.values())})}
        for name, group in groups.items():
            nodes[f"{base}/{name}"] = _group(attributes[name])
            for key, array in group.static.items():
                copy = StoredArray(f"{base}/{name}/{key}", array.document)
                copy.write_whole(self._files, read(array, 0, array.shape[0]))
                nodes[copy.path] = copy.document
            for key, array in group.arrays.items():
                copy = self._copied(f"{base}/{name}/{key}", array, group, moved[name], read)
                nodes[copy.path] = copy.document
                self.chunks[copy.path] = chunk_map(copy.committed())
        self.nodes |= nodes

    def _copied(self, path: str, array: StoredArray, group: RecordGroup, moved: int, read: Read) -> StoredArray:
        """The last records of an array, in chunks as while a run is written: one of them at a time in memory."""
        shape, document = (moved, *array.shape[1:]), array.document
        chunk = (array.chunk[0] if array.path.endswith("/step") else group.chunk_steps, *(max(size, 1) for size in array.shape[1:]))
        copy = StoredArray(
            path, array_document(shape, chunk, array.dtype, document["fill_value"], document["dimension_names"], document["attributes"])
        )
        first, stop = len(group.steps) - moved, len(group.steps)
        for number, start in enumerate(range(first, stop, chunk[0])):
            block = copy.empty(chunk[0])
            values = read(array, start, min(start + chunk[0], stop))
            block[: len(values)] = values
            copy.write(self._files, number, block)
        return copy


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}
