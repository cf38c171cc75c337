"""What a writer finds at a path: nothing yet, a run, or something else; and clearing up behind a writer that was killed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import METADATA, Files
from .format import DAMAGED, LINEAGES, chunks_written, newer_schema, schema_of
from .lineages import sweep
from .lock import LOCK_FILES
from .record_group import Read, RecordGroup
from .stored_array import StoredArray


def nothing_or_a_run(path: Path) -> bool:
    """Whether a run is to be made at `path`, rather than continued: there is nothing, or one whose writer was killed before its first commit.

    Raises:
        ValueError: it holds something else, or a run that this version cannot continue.
    """
    if not path.exists() or (path.is_dir() and all(entry.name in LOCK_FILES or entry.suffix == ".partial" for entry in path.iterdir())):
        return True
    try:
        document = json.loads((path / METADATA).read_text(encoding="utf-8"))
        attributes = document["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        attributes = None
    schema = schema_of(attributes)
    if schema is None:
        raise ValueError(f"store: {path} exists and is not an Optiscope run; choose another path")
    if newer := newer_schema(attributes):
        raise ValueError(f"store: {path} {newer}, or choose another path")
    return "consolidated_metadata" not in document


def clear(files: Files) -> None:
    """Take away what a writer left that was killed before its first commit; the lock is ours by now."""
    for entry in list(files.root.iterdir()):
        if entry.name not in LOCK_FILES:
            files.remove(entry.name)


def committed(files: Files, read: Read) -> tuple[dict[str, dict[str, Any]], dict[str, RecordGroup]]:
    """What was committed last, all else being removed: attributes by group, "" the run's own, and the groups of records.

    Raises:
        ValueError: a node lies outside the run, or is damaged, or a link is in the way.
    """
    for link in _links(files.root):
        raise ValueError(f"store: {link} is a link, behind which nothing of a run is written or removed; put what it leads to in its place")
    root = files.document("")
    nodes: dict[str, dict[str, Any]] = root["consolidated_metadata"]["metadata"]
    for path in nodes:
        if not all(part and part.strip(".") and "\\" not in part and ":" not in part for part in path.split("/")):
            raise ValueError(f"store: {files.root} holds {path[:100]!r}, which is no path within it; choose another path")
    attributes: dict[str, dict[str, Any]] = {"": root["attributes"]}
    groups: dict[str, RecordGroup] = {}
    masks = attributes[""].pop("chunks", None)
    attributes[""].pop("checksum", None)
    sweep(files, len(attributes[""].get(LINEAGES, [])))
    for partial in list(files.root.rglob("*.partial") if masks is None else files.root.glob("*.partial")):
        partial.unlink()
    for path, node in nodes.items():
        if node["node_type"] == "group":
            attributes[path] = node["attributes"]
            arrays: dict[str, StoredArray] = {}
            for child, document in nodes.items():
                parent, _, name = child.rpartition("/")
                if document["node_type"] == "array" and parent == path:
                    array = arrays[name] = StoredArray(child, document)
                    # A run of schema 1 does not say.
                    array.on_disk = array.files_there(files) if masks is None else set(chunks_written(masks.get(child, "0")))
                    _sweep(files, array)
            if "step" in arrays:
                steps = read(arrays["step"], 0, arrays["step"].shape[0]).tolist()
                groups[path] = RecordGroup(path, arrays, steps, read)
    return attributes, groups


def _links(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield entry.path
            # Nothing is written into a lineage that is there, nor into what was moved aside.
            elif entry.name not in (LINEAGES, DAMAGED) and entry.is_dir():
                yield from _links(Path(entry.path))


def _sweep(files: Files, array: StoredArray) -> None:
    """Remove chunks that belong to no commit: the next records may be missing throughout, and then nothing is written over them."""
    remove_chunks(files, array.path, "/" if array.separator == "." else ".")
    if array.has_steps:
        kept = set(array.committed())
        rows = {number // array.width for number in kept}
        for entry in (files.root / array.path).glob("c.*" if array.separator == "." else "c/*"):
            index = entry.name.removeprefix("c.").split(".")[0]
            if not index.isdecimal() or int(index) not in rows:
                files.remove(str(entry.relative_to(files.root)))
        for number in {row * array.width + column for row in rows for column in range(array.width)} - kept:
            files.remove(array.file(number))
        array.on_disk = kept


def remove_chunks(files: Files, path: str, separator: str) -> None:
    """Remove all chunks of an array that lie there with this separator in their keys."""
    for entry in (files.root / path).glob("c" if separator == "/" else "c.*"):
        files.remove(f"{path}/{entry.name}")
