"""What a writer finds at a path: nothing yet, a run, or something else; and clearing up after a writer that was killed."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from .files import Files, remove_chunks
from .format import DAMAGED, LINEAGES
from .lineages import check_lineages, sweep
from .lock import LOCK_FILES
from .open_array import OpenArray, files_there
from .opening import described, has_records, labels
from .reading import check_all, read_all
from .record_group import RecordGroup
from .root_document import GIVE, read_document
from .run_error import RunError

Attributes: TypeAlias = dict[str, dict[str, Any]]


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Say of what fails in the block that it is the run at `path`, to be written to, and what to do."""
    try:
        yield
    except RunError as error:
        advice = f"`diag verify --repair {path}` saves what can be saved of it, or record to another path"
        raise error.told(subject="store", place=path, advice=advice) from error


def nothing_or_a_run(path: Path) -> bool:
    """Whether a run is to be made at `path`, rather than continued: there is nothing, or one whose writer was killed before its first commit.

    Raises:
        RunError: it holds something else, or a run that this version cannot continue, or one that readers refuse by its root's document.
    """
    if not path.exists() or (path.is_dir() and all(entry.name in LOCK_FILES or entry.suffix == ".partial" for entry in path.iterdir())):
        return True
    with refusing(path):
        try:
            document = read_document(path.resolve())
        except RunError as error:
            if error.advice != GIVE:  # a newer version can
                raise RunError(error.reason, advice=f"{error.advice}, or choose another path") from error
            if has_records(path):
                raise RunError(error.reason) from error
            raise RunError("exists and is not an Optiscope run", advice="choose another path") from error
        described(path.resolve(), document)
    return "consolidated_metadata" not in document


def clear(files: Files) -> None:
    """Take away what a writer left that was killed before its first commit; the lock is ours by now."""
    for entry in list(files.root.iterdir()):
        if entry.name not in LOCK_FILES:
            files.remove(entry.name)


def committed(path: Path) -> tuple[Attributes, dict[str, RecordGroup], dict[str, NDArray[Any]]]:
    """What was committed last: attributes by group, "" the run's own; the groups of records; and the values of static coordinates, by path.

    All that continuing the run will read is read, so that what is damaged is found before anything is changed.

    Raises:
        RunError: the run is not whole, as far as that, or a link is in the way; told without the run.
    """
    for link in _links(path):
        reason = "is a link, behind which nothing of a run is written or removed"
        raise RunError(reason, subject="store", place=link, advice="put what it leads to in its place")
    folder = path.resolve()
    found = described(folder, read_document(folder))
    read = labels(folder, found)
    check_lineages(folder, found.attributes.get(LINEAGES, []))
    attributes: Attributes = {"": {key: value for key, value in found.attributes.items() if key not in ("chunks", "checksum")}}
    groups: dict[str, RecordGroup] = {}
    for node in found.groups:
        attributes[node.path] = dict(node.attributes)
        # A run of schema 1 does not say which chunks there are.
        arrays = {
            name: OpenArray(array, files_there(folder, array) if array.written is None else array.written)
            for name, array in node.arrays.items()
        }
        if not arrays:
            continue
        groups[node.path] = group = RecordGroup(folder, node.path, arrays, read[f"{node.path}/step"].tolist())
        for array in group.static.values():
            if array.stored.path not in read:
                read[array.stored.path] = read_all(folder, array.to_read())
        for name in group.arrays:
            if not group.lies_for_writing(name):
                check_all(folder, group.arrays[name].to_read())
        group.read_back()
    return attributes, groups, read


def tidy(files: Files, groups: Iterable[RecordGroup], lineages: int, everywhere: bool) -> None:
    """Remove what belongs to no commit: half-written files (`everywhere` in a run of schema 1), chunks, and lineages after the first so many."""
    sweep(files, lineages)
    for partial in list(files.root.rglob("*.partial") if everywhere else files.root.glob("*.partial")):
        partial.unlink()
    for group in groups:
        for array in (group.static | group.arrays).values():
            _sweep(files, array)


def _links(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield entry.path
            # Nothing is written into a lineage that is there, nor into what was moved aside.
            elif entry.name not in (LINEAGES, DAMAGED) and entry.is_dir():
                yield from _links(Path(entry.path))


def _sweep(files: Files, array: OpenArray) -> None:
    """Remove chunks that belong to no commit: the next records may be missing throughout, and then nothing is written over them."""
    stored = array.stored
    remove_chunks(files, stored.path, "/" if stored.separator == "." else ".")
    if stored.has_steps:
        kept, width = set(array.committed()), stored.width
        rows = {number // width for number in kept}
        for entry in (files.root / stored.path).glob("c.*" if stored.separator == "." else "c/*"):
            index = entry.name.removeprefix("c.").split(".")[0]
            if not index.isdecimal() or int(index) not in rows:
                files.remove(str(entry.relative_to(files.root)))
        for number in {row * width + column for row in rows for column in range(width)} - kept:
            files.remove(stored.key(stored.numbers_at(number)))
        array.on_disk = kept
