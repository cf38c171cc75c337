"""What trainings left that were restarted from a checkpoint: each a group of its own below the run, as a run is laid out (docs/store.md).

It is written whole before the commit of the run that lists it, and never changes again.
"""

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from .codecs import array_document
from .commit import nodes_of, root_document
from .files import Files
from .format import LINEAGES
from .record_group import Read, RecordGroup
from .stored_array import StoredArray


def leave(
    files: Files, number: int, groups: Mapping[str, RecordGroup], attributes: Mapping[str, Mapping[str, Any]], after: int, read: Read
) -> dict[str, int]:
    """Copy the records behind step `after` into lineage `number`, which no commit knows yet. The groups stay as they are.

    Args:
        groups: all groups of records, each record of theirs committed, by name.
        attributes: of the run (under "") and of its groups; a lineage has them as they were when it was left.
        after: a step that some record is behind.
        read: reads an array.

    Returns:
        What the run is to say of it.
    """
    files.remove(f"{LINEAGES}/{number}")
    own = Files(files.root / LINEAGES / str(number), uuid4().hex)
    own.root.mkdir(parents=True)
    copies = {name: _copied(own, group, sum(step > after for step in group.steps), read) for name, group in groups.items()}
    last = max(group.steps[-1] for group in groups.values() if group.steps)
    entry = {"lineage": number, "after": after, "last_step": last, "records": max(len(copy.steps) for copy in copies.values())}
    nodes = nodes_of(attributes, copies)
    for path, node in nodes.items():
        own.replace_document(path, node)
    own.replace_document("", root_document({**attributes[""], **entry}, nodes, copies))
    return entry


def sweep(files: Files, count: int) -> None:
    """Remove what a writer that was killed had copied: the run lists the first `count` lineages alone."""
    folder = files.root / LINEAGES
    listed = set(map(str, range(count)))
    for entry in list(folder.iterdir()) if folder.is_dir() else ():
        if entry.name.isdecimal() and entry.name not in listed:
            files.remove(f"{LINEAGES}/{entry.name}")


def _copied(own: Files, group: RecordGroup, moved: int, read: Read) -> RecordGroup:
    """The last records of a group."""
    arrays = {}
    for name, array in group.static.items():
        arrays[name] = StoredArray(array.path, array.document)
        arrays[name].write_whole(own, read(array, 0, array.shape[0]))
    for name, array in group.arrays.items():
        arrays[name] = _copied_array(own, array, group, moved, read)
    return RecordGroup(group.path, arrays, group.steps[len(group.steps) - moved :], read)


def _copied_array(own: Files, array: StoredArray, group: RecordGroup, moved: int, read: Read) -> StoredArray:
    """The last records of an array, in chunks as while a run is written: one of them at a time in memory."""
    shape, document = (moved, *array.shape[1:]), array.document
    chunk = (array.chunk[0] if array.path.endswith("/step") else group.chunk_steps, *(max(size, 1) for size in array.shape[1:]))
    copy = StoredArray(
        array.path, array_document(shape, chunk, array.dtype, document["fill_value"], document["dimension_names"], document["attributes"])
    )
    first, stop = len(group.steps) - moved, len(group.steps)
    for number, start in enumerate(range(first, stop, chunk[0])):
        block = copy.empty(chunk[0])
        values = read(array, start, min(start + chunk[0], stop))
        block[: len(values)] = values
        copy.write(own, number, block)
    return copy
