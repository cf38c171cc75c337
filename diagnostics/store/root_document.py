"""The document at a run's root, which describes all of it: made by a commit, and read within bounds and checked before anything it names is opened."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..catalogue import in_group
from .array_metadata import stored_array
from .bounded_json import MAX_BYTES, parse_bounded
from .bounds import MAX_NODES, MAX_OPENED, MAX_TEXT, MAX_UNMAPPED
from .checked_attributes import check_attributes, check_schedules
from .files import METADATA
from .format import OF_LINEAGE, chunk_map, chunks_written, consolidated, newer_schema, schema_of, seal
from .reading import read_file
from .record_group import RecordGroup
from .run_error import RunError
from .stored_array import StoredArray

Nodes: TypeAlias = dict[str, dict[str, Any]]

# As it is made


def nodes_of(attributes: Mapping[str, Mapping[str, Any]], groups: Mapping[str, RecordGroup]) -> Nodes:
    """The documents of all groups and arrays, by path; `attributes` are those of the groups, "" of the run."""
    nodes: Nodes = {}
    for name in sorted(name for name in attributes if name):
        nodes[name] = group_document(attributes[name])
        if name in groups:  # the others hold groups alone
            nodes |= {array.stored.path: array.document for _, array in sorted((groups[name].static | groups[name].arrays).items())}
    return nodes


def root_document(attributes: Mapping[str, Any], nodes: Nodes, groups: Mapping[str, RecordGroup]) -> dict[str, Any]:
    """The root's document with all others in it, as `zarr.consolidate_metadata` would write it, sealed.

    (Zarr's own warns that the format may change; silencing that would reset the warning filters of the training process at every flush.)
    """
    inner = {path: {**node, **consolidated({})} if node["node_type"] == "group" else node for path, node in nodes.items()}
    chunks = {array.stored.path: chunk_map(array.committed()) for group in groups.values() for array in group.arrays.values()}
    root = {**group_document({**attributes, "chunks": chunks}), **consolidated(inner)}
    root["attributes"]["checksum"] = seal(root)
    return root


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A group's own document."""
    # As it reads back: a key that is no text becomes one, and the seal is of that.
    return {"attributes": json.loads(json.dumps(attributes)), "zarr_format": 3, "node_type": "group"}


# As it is read

GIVE = "give the folder that was passed to `attach`"


@dataclass(frozen=True)
class Node:
    """A group: its path within the run, its attributes, its arrays by name."""

    path: str
    attributes: Mapping[str, Any]
    arrays: Mapping[str, StoredArray]


@dataclass(frozen=True)
class Contents:
    """What a run holds, as its root says: the run's attributes, and its groups."""

    attributes: Mapping[str, Any]
    groups: tuple[Node, ...]


def read_document(folder: Path) -> dict[str, Any]:
    """The document of a run's root, of a schema that this version reads; nothing else in it has been checked.

    Raises:
        RunError: it is no run's, or one of a newer schema; told without the run.
    """
    why, document = "there is no zarr.json in it", None
    try:
        content = read_file(folder, METADATA, MAX_BYTES)
        if content is not None:
            why, document = "", parse_bounded(content)
    except RunError as error:
        why = f"{METADATA}: {error.reason}"
    except (OSError, ValueError) as error:
        why = str(error)
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if isinstance(document, dict) and isinstance(attributes, dict) and schema_of(attributes) is not None:
        if newer := newer_schema(attributes):
            raise newer
        return document
    raise RunError(f"is not an Optiscope run{why and f' ({why})'}", advice=GIVE)


def of_lineage(document: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A document, if it is that of the lineage of which a run's root says `entry`.

    Raises:
        RunError: it is not; told without the run.
    """
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or any(attributes.get(name) != entry[name] for name in OF_LINEAGE):
        raise RunError("it is not that of the lineage which the run lists", file=METADATA)
    return dict(document)


def contents(document: Mapping[str, Any]) -> Contents:
    """What a document describes.

    Raises:
        RunError: something that a recorder does not write; told without the run.
    """
    attributes = document["attributes"]
    check_seal(document)
    check_attributes(attributes)
    if "consolidated_metadata" not in document:
        return Contents(attributes, ())  # its writer was killed before the first commit
    try:
        nodes = document["consolidated_metadata"]["metadata"]
        if len(nodes) > MAX_NODES:
            raise RunError(f"expected at most {MAX_NODES:,} groups and arrays, got {len(nodes):,}", file=METADATA)
        groups = tuple(_groups(nodes, attributes.get("chunks", {})))
        if sum(map(opened_bytes, groups)) > MAX_OPENED:
            raise RunError(TOO_LONG, file=METADATA)
        return Contents(attributes, groups)
    except RunError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"expected the metadata of groups and arrays, got something else ({error!r:.80})", file=METADATA) from None


def check_seal(document: Mapping[str, Any]) -> None:
    """Refuse a document that is not as a commit made it.

    Raises:
        RunError: it is so; told without the run.
    """
    attributes = document["attributes"]
    if "checksum" in attributes:
        if attributes["checksum"] != seal(document):
            raise RunError("its checksum does not match, so it was changed or damaged", file=METADATA)
    elif schema_of(attributes) != 1 and ("consolidated_metadata" in document or "chunks" in attributes):
        raise RunError("it has no checksum, so it was changed by something else than a recorder", file=METADATA)


TOO_LONG = f"expected at most {MAX_OPENED:,} bytes of steps and names, got more"


def opened_bytes(group: Node) -> int:
    """Bytes that opening a group may take: its steps, and the names of its matrices, which may be long."""
    steps, names = (prod(group.arrays[name].shape) if name in group.arrays else 0 for name in ("step", "name"))
    return 8 * steps + min(1_000 * names, MAX_TEXT)


def _groups(nodes: Mapping[str, Any], maps: Mapping[str, Any]) -> Iterator[Node]:
    arrays: dict[str, dict[str, StoredArray]] = {path: {} for path, node in nodes.items() if node["node_type"] == "group"}
    unmapped = 0
    for path, node in nodes.items():
        parts = path.split("/")
        if len(parts) > 2 or any(part in ("", ".", "..") or len(part.encode()) > 255 or "\0" in part or "\\" in part for part in parts):
            raise RunError(f"expected names of groups and arrays, got {path!r:.80}", file=METADATA)
        parent = "/".join(parts[:-1])
        if (parent or node["node_type"] != "group") and parent not in arrays:
            raise RunError(f"expected {path!r:.80} in a group of the run, got it without one", file=METADATA)
        if node["node_type"] == "group" and not parent:
            continue
        if node["node_type"] != "array":
            raise RunError(f"expected {path!r:.80} to be an array, got {node['node_type']!r:.80}", file=METADATA)
        mask = maps.get(path)
        if mask is not None and (not isinstance(mask, str) or len(mask) > 100_000):
            raise RunError(f"expected a hexadecimal mask of the chunks of {path!r:.80}, got {mask!r:.40}", file=METADATA)
        written = None if mask is None else frozenset(chunks_written(mask))
        array = stored_array(path, node, written)
        files = prod(array.grid)
        if max(written or (), default=0) >= max(files, 1):
            raise RunError(f"expected at most {files:,} chunks of {path!r:.80} to have been written, got more", file=METADATA)
        if maps and "step" not in array.dimensions:
            array = replace(array, written=range(files))  # what does not grow was written whole
        unmapped += files if array.written is None else 0
        if unmapped > MAX_UNMAPPED:
            raise RunError(f"expected at most {MAX_UNMAPPED:,} chunks of arrays without a map of them, got more", file=METADATA)
        arrays[parent][parts[-1]] = array
    for path, own in arrays.items():
        if own and "step" not in own:
            raise RunError("expected step, whole numbers along step, got none", file=path)
        sizes: dict[str, int] = {}
        for array in own.values():
            for name, size in zip(array.dimensions, array.shape, strict=True):
                if sizes.setdefault(name, size) != size:
                    raise RunError(f"expected {sizes[name]:,} along {name} as elsewhere in its group, got {size:,}", file=array.path)
        for name, coordinate, dtype in (("step", "step", np.dtype("<i8")), ("matrix", "name", None)):
            if sizes.get(name) and (coordinate not in own or (own[coordinate].dimensions, own[coordinate].dtype) != ((name,), dtype)):
                kind = "whole numbers" if dtype else "texts"
                raise RunError(f"expected {coordinate}, {kind} along {name}, got something else or none", file=path)
        expected = {name: (("matrix",), kind) for name, kind in _COORDINATES.items()} | {
            one.name: (("step", "matrix", *([one.extra] if one.extra else [])), np.dtype(one.dtype).kind) for one in in_group(path)
        }
        for name in expected.keys() & own.keys():
            dimensions, kind = expected[name]
            if own[name].dimensions != dimensions or ("T" if (dtype := own[name].dtype) is None else dtype.kind) != kind:
                raise RunError(f"expected {_KINDS[kind]} along {', '.join(dimensions)}, got something else", file=f"{path}/{name}")
        group = nodes[path]["attributes"]
        check_schedules(path, group.get("ns_schedules", []))
        yield Node(path, group, own)


# What every group may say of its matrices, and what kinds are in words.
_COORDINATES = dict.fromkeys(("operator", "optimizer"), "T") | dict.fromkeys(
    ("layer", "expert", "rows", "cols", "query_heads", "kv_heads"), "i"
)
_KINDS = {"T": "texts", "i": "whole numbers", "f": "numbers", "b": "truth values"}
