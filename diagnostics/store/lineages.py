"""What trainings left that were restarted from a checkpoint: each a group of its own below the run, as a run is laid out (docs/store.md).

It is written whole before the commit of the run that lists it, and never changes again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from .bounded_json import MAX_BYTES, parse_bounded
from .bounds import MAX_NODES, MAX_OPENED
from .files import METADATA, Files
from .format import LINEAGES
from .open_array import OpenArray
from .reading import read_all, read_file, read_rows
from .record_group import RecordGroup
from .root_document import TOO_LONG, Contents, check_seal, contents, nodes_of, of_lineage, opened_bytes, root_document
from .run_error import RunError
from .stored_array import new_array


def lineage_contents(folder: Path, entries: Sequence[Mapping[str, Any]]) -> list[Contents]:
    """What lineages of the run in `folder` hold, of which its root says `entries`: checked as the run, and all together within the bounds of one.

    Raises:
        RunError: one is damaged, or they are more than that; told without the run.
    """
    found: list[Contents] = []
    most, nodes, opened = MAX_BYTES, MAX_NODES, MAX_OPENED
    for entry in entries:
        with _of(entry):
            document, size = _read(folder, entry, most)
            one = contents(document)
        found.append(one)
        most -= size
        nodes -= sum(1 + len(group.arrays) for group in one.groups)
        opened -= sum(map(opened_bytes, one.groups))
        if opened < 0 or nodes < 0:
            what = TOO_LONG if opened < 0 else f"expected at most {MAX_NODES:,} groups and arrays"
            raise RunError(f"{what} in lineages that are read together", file=folder_of(entry))
    return found


def check_lineages(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """See that the document of each lineage is there, as it was written: whoever only goes on beside them reads nothing else of it.

    Raises:
        RunError: one is not; told without the run.
    """
    for entry in entries:
        with _of(entry):
            check_seal(_read(folder, entry, MAX_BYTES)[0])


def folder_of(entry: Mapping[str, Any]) -> str:
    """Where in the run a lineage lies."""
    return f"{LINEAGES}/{entry['lineage']}"


@contextmanager
def _of(entry: Mapping[str, Any]) -> Iterator[None]:
    """Say of what fails in the block that it is a lineage's."""
    try:
        yield
    except RunError as error:
        raise error.told(folder=folder_of(entry)) from error


def _read(folder: Path, entry: Mapping[str, Any], most: int) -> tuple[dict[str, Any], int]:
    """The document of a lineage, and how many bytes it has."""
    content = read_file(folder / folder_of(entry), METADATA, most)
    if content is None:
        raise RunError("there is no such file", file=METADATA)
    try:
        document = parse_bounded(content)
    except ValueError as error:
        raise RunError(str(error), file=METADATA) from error
    return of_lineage(document, entry), len(content)


def leave(
    files: Files, number: int, groups: Mapping[str, RecordGroup], attributes: Mapping[str, Mapping[str, Any]], after: int
) -> dict[str, int]:
    """Copy the records after step `after` into lineage `number`, which no commit knows yet. The groups stay as they are.

    Args:
        groups: all groups of records, each record of theirs committed, by name.
        attributes: of the run (under "") and of its groups; a lineage has them as they were when it was left.
        after: a step after which there is some record.

    Returns:
        What the run is to say of it.

    Raises:
        RunError: a record is damaged; told without the run, and nothing of the copy is left.
    """
    files.remove(f"{LINEAGES}/{number}")
    own = Files(files.root / LINEAGES / str(number), uuid4().hex)
    own.root.mkdir(parents=True)
    try:
        copies = {name: _copied(own, group, sum(step > after for step in group.steps)) for name, group in groups.items()}
    except RunError:
        files.remove(f"{LINEAGES}/{number}")
        with suppress(OSError):
            own.root.parent.rmdir()  # where there is no other
        raise
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


def _copied(own: Files, group: RecordGroup, moved: int) -> RecordGroup:
    """The last records of a group."""
    arrays = {}
    for name, array in group.static.items():
        arrays[name] = OpenArray(array.stored)
        arrays[name].write_whole(own, read_all(group.folder, array.to_read()))
    for name, array in group.arrays.items():
        arrays[name] = _copied_array(own, array, group, moved)
    return RecordGroup(own.root, group.path, arrays, group.steps[len(group.steps) - moved :])


def _copied_array(own: Files, array: OpenArray, group: RecordGroup, moved: int) -> OpenArray:
    """The last records of an array, in chunks as while a run is written: one of them at a time in memory."""
    held, source = array.stored, array.to_read()
    length = held.shard[0] if held.name == "step" else group.chunk_steps
    shape = (moved, *held.shape[1:])
    made = new_array(held.path, shape, held.dimensions, held.in_memory, held.fill, (length, *held.shape[1:]), held.attributes)
    copy = OpenArray(made)
    first, stop = len(group.steps) - moved, len(group.steps)
    for number, start in enumerate(range(first, stop, length)):
        copy.write(own, number, read_rows(group.folder, source, start, min(start + length, stop)))
    return copy
