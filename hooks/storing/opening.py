"""What a writer finds at a path: nothing yet, a run, or something else; and clearing up behind a writer that was killed."""

import json
from pathlib import Path
from typing import Any

from ...diagnostics.catalogue import SCHEMA
from ...diagnostics.run_format import newer_schema, schema_of
from ...diagnostics.run_lock import LOCK_FILES
from .files import METADATA, Files
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
    if schema != SCHEMA:
        raise ValueError(f"store: {path} has schema {schema!r}, this version appends to schema {SCHEMA}; choose another path")
    return "consolidated_metadata" not in document


def clear(files: Files) -> None:
    """Take away what a writer left that was killed before its first commit; the lock is ours by now."""
    for entry in list(files.root.iterdir()):
        if entry.name not in LOCK_FILES:
            files.remove(entry.name)


def committed_nodes(path: Path) -> dict[str, dict[str, Any]]:
    """Metadata of all nodes of a run as last committed, by path; "" is the root.

    Raises:
        ValueError: a node lies outside the run.
    """
    root = json.loads((path / METADATA).read_text(encoding="utf-8"))
    nodes: dict[str, dict[str, Any]] = root["consolidated_metadata"]["metadata"]
    for node in nodes:
        if not all(part and part.strip(".") and "\\" not in part and ":" not in part for part in node.split("/")):
            raise ValueError(f"store: {path} holds {node[:100]!r}, which is no path within it; choose another path")
    return {"": root, **nodes}


def sweep(files: Files, array: StoredArray) -> None:
    """Remove chunks that belong to no commit: the next records may be missing throughout, and then nothing is written over them."""
    folder = files.root / array.path
    separator = array.document["chunk_key_encoding"]["configuration"]["separator"]
    for entry in [*folder.glob("c.*"), *folder.glob("c")]:
        if (entry.name == "c") != (separator == "/"):
            files.remove(f"{array.path}/{entry.name}")
    if array.has_steps:
        kept = set(array.committed())
        rows = {number // array.width for number in kept}
        for entry in folder.glob("c.*" if separator == "." else "c/*"):
            index = entry.name.removeprefix("c.").split(".")[0]
            if not index.isdecimal() or int(index) not in rows:
                files.remove(str(entry.relative_to(files.root)))
        for number in {row * array.width + column for row in rows for column in range(array.width)} - kept:
            files.remove(array.file(number))
        array.on_disk = kept
