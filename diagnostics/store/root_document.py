"""The document at a run's root, which describes all of it: read within bounds, and checked before anything it names is opened."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from ..catalogue import in_group
from .bounded_json import MAX_BYTES, parse_bounded
from .checked_array import MAX_TEXT, StoredArray, stored_array
from .format import LINEAGES, OF_LINEAGE, chunks_written, newer_schema, schema_of, seal
from .reading import read_file

MAX_NODES = 20_000  # groups and arrays
MAX_UNBACKED_CELLS = 60_000_000  # records times matrices of a group that need not have a byte each in the run's files
MAX_OPENED = 2**29  # bytes of steps and names, which opening reads
MAX_LOGGED = 100_000  # of what a run's attributes list
MAX_UNMAPPED = 100_000  # files of which only a look tells whether they are there


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


def read_document(folder: Path, given: Path | None = None) -> dict[str, Any]:
    """The document of a run's root, of a schema that this version reads; nothing else in it has been checked. Messages name the folder as it was `given`.

    Raises:
        ValueError: it is no run's, or one of a newer schema.
    """
    why, document = " (there is no zarr.json in it)", None
    try:
        content = read_file(folder, "zarr.json", MAX_BYTES)
        if content is not None:
            why, document = "", parse_bounded(content)
    except (OSError, ValueError) as error:
        why = f" ({error})"
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if schema_of(attributes) is None or not isinstance(document, dict) or not isinstance(attributes, dict):
        raise ValueError(f"run: {given or folder} is not an Optiscope run{why}; give the folder that was passed to `attach`")
    if newer := newer_schema(attributes):
        raise ValueError(f"run: {given or folder} {newer}")
    return document


def refuse_unbacked(folder: Path, found: Contents) -> None:
    """Refuse more cells than metadata alone may demand memory for, where the run's files do not hold a byte for each; a recorder writes hundreds.

    Raises:
        ValueError: it is so; told without the run.
    """
    cells = max((prod(array.shape[:2]) for group in found.groups for array in group.arrays.values()), default=0)
    if cells > MAX_UNBACKED_CELLS:
        held = sum(file.lstat().st_size for file in folder.rglob("*"))
        if held < cells:
            raise ValueError(f"zarr.json: expected files of at least {cells:,} bytes for as many records times matrices, got {held:,}")


def lineage_contents(folder: Path, entries: Sequence[Mapping[str, Any]]) -> list[Contents]:
    """What lineages of the run in `folder` hold, of which its root says `entries`: checked as the run, and all together within the bounds of one.

    Raises:
        ValueError: one is damaged, or they are more than that; told without the run.
    """
    found: list[Contents] = []
    most, nodes, opened = MAX_BYTES, MAX_NODES, MAX_OPENED
    for entry in entries:
        place = f"{LINEAGES}/{entry['lineage']}"
        try:
            content = read_file(folder, f"{place}/zarr.json", most)
            if content is None:
                raise ValueError("zarr.json: there is no such file")
            found.append(contents(of_lineage(parse_bounded(content), entry)))
        except ValueError as error:
            raise ValueError(f"{place}: {error}; `diag verify` tells what is whole") from error
        most -= len(content)
        nodes -= sum(1 + len(group.arrays) for group in found[-1].groups)
        opened -= sum(map(_opened, found[-1].groups))
        if opened < 0:
            raise ValueError(f"{place}: {_TOO_LONG} in lineages that are read together")
        if nodes < 0:
            raise ValueError(f"{place}: expected at most {MAX_NODES:,} groups and arrays in lineages that are read together")
    return found


def of_lineage(document: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A document, if it is that of the lineage of which a run's root says `entry`.

    Raises:
        ValueError: it is not; told without the run.
    """
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or any(attributes.get(name) != entry[name] for name in OF_LINEAGE):
        raise ValueError("zarr.json: it is not that of the lineage which the run lists")
    return dict(document)


def contents(document: Mapping[str, Any]) -> Contents:
    """What a document describes.

    Raises:
        ValueError: something that a recorder does not write; told without the run.
    """
    attributes = document["attributes"]
    if "checksum" in attributes and attributes["checksum"] != seal(document):
        raise ValueError(
            "zarr.json: its checksum is of something else, so it was changed or damaged; `diag verify` tells what can be saved"
        )
    _check_attributes(attributes)
    if "consolidated_metadata" not in document:
        return Contents(attributes, ())  # its writer was killed before the first commit
    try:
        nodes = document["consolidated_metadata"]["metadata"]
        if len(nodes) > MAX_NODES:
            raise ValueError(f"zarr.json: expected at most {MAX_NODES:,} groups and arrays, got {len(nodes):,}")
        maps = attributes.get("chunks", {})
        groups = tuple(_groups(nodes, maps))
        if sum(map(_opened, groups)) > MAX_OPENED:
            raise ValueError(f"zarr.json: {_TOO_LONG}")
        return Contents(attributes, groups)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"zarr.json: expected the metadata of groups and arrays, got something else ({error!r:.80})") from None


_TOO_LONG = f"expected at most {MAX_OPENED:,} bytes of steps and names, got more"


def _opened(group: Node) -> int:
    """Bytes that opening a group may take: its steps, and the names of its matrices, which may be long."""
    steps, names = (prod(group.arrays[name].shape) if name in group.arrays else 0 for name in ("step", "name"))
    return 8 * steps + min(1_000 * names, MAX_TEXT)


def _groups(nodes: Mapping[str, Any], maps: Mapping[str, Any]) -> Iterator[Node]:
    arrays: dict[str, dict[str, StoredArray]] = {path: {} for path, node in nodes.items() if node["node_type"] == "group"}
    unmapped = 0
    for path, node in nodes.items():
        parts = path.split("/")
        if len(parts) > 2 or any(part in ("", ".", "..") or len(part.encode()) > 255 or "\0" in part or "\\" in part for part in parts):
            raise ValueError(f"zarr.json: expected names of groups and arrays, got {path!r:.80}")
        parent = "/".join(parts[:-1])
        if (parent or node["node_type"] != "group") and parent not in arrays:
            raise ValueError(f"zarr.json: expected {path!r:.80} in a group of the run, got it without one")
        if node["node_type"] == "group":
            continue
        if node["node_type"] != "array":
            raise ValueError(f"zarr.json: expected {path!r:.80} to be a group or an array, got {node['node_type']!r:.80}")
        mask = maps.get(path)
        if mask is not None and (not isinstance(mask, str) or len(mask) > 100_000):
            raise ValueError(f"zarr.json: expected a hexadecimal mask of the chunks of {path!r:.80}, got {mask!r:.40}")
        written = None if mask is None else frozenset(chunks_written(mask))
        array = stored_array(path, node, written)
        files = prod(array.grid)
        if max(written or (), default=0) >= max(files, 1):
            raise ValueError(f"zarr.json: expected at most {files:,} chunks of {path!r:.80} to have been written, got more")
        if maps and "step" not in array.dimensions:
            array = replace(array, written=range(files))  # what does not grow was written whole
        unmapped += files if array.written is None else 0
        if unmapped > MAX_UNMAPPED:
            raise ValueError(f"zarr.json: expected at most {MAX_UNMAPPED:,} chunks of arrays without a map of them, got more")
        arrays[parent][parts[-1]] = array
    for path, own in arrays.items():
        sizes: dict[str, int] = {}
        for array in own.values():
            for name, size in zip(array.dimensions, array.shape, strict=True):
                if sizes.setdefault(name, size) != size:
                    raise ValueError(f"{array.path}: expected {sizes[name]:,} along {name} as elsewhere in its group, got {size:,}")
        for name, coordinate, dtype in (("step", "step", np.dtype("<i8")), ("matrix", "name", None)):
            if sizes.get(name) and (coordinate not in own or (own[coordinate].dimensions, own[coordinate].dtype) != ((name,), dtype)):
                raise ValueError(
                    f"{path}: expected {coordinate}, {'whole numbers' if dtype else 'texts'} along {name}, got something else or none"
                )
        expected = {name: (("matrix",), kind) for name, kind in _COORDINATES.items()} | {
            one.name: (("step", "matrix", *([one.extra] if one.extra else [])), np.dtype(one.dtype).kind) for one in in_group(path)
        }
        for name in expected.keys() & own.keys():
            dimensions, kind = expected[name]
            if own[name].dimensions != dimensions or ("T" if (dtype := own[name].dtype) is None else dtype.kind) != kind:
                raise ValueError(f"{path}/{name}: expected {_KINDS[kind]} along {', '.join(dimensions)}, got something else")
        group = nodes[path]["attributes"]
        _check_schedules(path, group.get("ns_schedules", []))
        yield Node(path, group, own)


# What every group may say of its matrices, and what kinds are in words.
_COORDINATES = dict.fromkeys(("operator", "optimizer"), "T") | dict.fromkeys(("layer", "rows", "cols", "query_heads", "kv_heads"), "i")
_KINDS = {"T": "texts", "i": "whole numbers", "f": "numbers", "b": "truth values"}

# What the run's own attributes are lists of, and what each entry must hold.
_LISTS: dict[str, dict[str, type | UnionType]] = {
    "optimizers": {"label": str, "class": str, "groups": list, "spectrum_of": str | list},
    "continued": {"first_step": int, "optimizers": list},
    "decisions": {"step": int, "optimizer": str, "kind": str, "why": str, "steps": dict | None},
    "alignment_events": {"step": int, "optimizer": str, "group": int, "event": str, "alignment": float | int, "factor": float | int},
    LINEAGES: dict.fromkeys(OF_LINEAGE, int),
}


def _check_attributes(attributes: Mapping[str, Any]) -> None:
    for name, needed in _LISTS.items():
        entries = attributes.get(name, [])
        whole = isinstance(entries, list) and len(entries) <= MAX_LOGGED and all(isinstance(entry, dict) for entry in entries)
        if not whole or not all(isinstance(entry.get(key), kind) for entry in entries for key, kind in needed.items()):
            raise ValueError(
                f"zarr.json: expected {name} to be a list of at most {MAX_LOGGED:,} that say {', '.join(needed)}, got something else"
            )
    if len(left := attributes.get(LINEAGES, [])) > MAX_NODES:
        raise ValueError(f"zarr.json: expected at most {MAX_NODES:,} lineages, got {len(left):,}")
    for number, entry in enumerate(left):
        if entry["lineage"] != number or any(type(entry[name]) is not int or entry[name] < 0 for name in OF_LINEAGE):
            raise ValueError(f"zarr.json: expected lineage {number} in its place, and steps from 0 on, got {entry!r:.80}")
    for optimizer in [
        *attributes.get("optimizers", []),
        *(one for entry in attributes.get("continued", []) for one in entry["optimizers"]),
    ]:
        if not isinstance(optimizer, dict) or not all(isinstance(group, dict) for group in optimizer.get("groups", [])):
            raise ValueError(f"zarr.json: expected optimizers to say their groups, got {optimizer!r:.60}")
        for name in ("wrapped_by", "read_by", "spectrum_of"):
            texts = optimizer.get(name, [])
            if not isinstance(texts, (str, list)) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"zarr.json: expected {name} of an optimizer to be texts, got {texts!r:.60}")
    for name in ("missed", "dropped", "errors"):
        if type(count := attributes.get(name, 0)) is not int or not 0 <= count < 2**63:
            raise ValueError(f"zarr.json: expected {name} to be a count, got {count!r:.60}")
    for name in ("versions", "about", "chunks"):
        if not isinstance(attributes.get(name, {}), dict):
            raise ValueError(f"zarr.json: expected {name} to be an object, got {attributes[name]!r:.60}")


def _check_schedules(path: str, schedules: Any) -> None:
    """Coefficients are iterated over every spectrum: so many, of so many steps."""
    whole = isinstance(schedules, list) and len(schedules) <= MAX_LOGGED and all(isinstance(one, dict) for one in schedules)
    if not whole or not all(_triples(one.get("coefficients")) for one in schedules):
        raise ValueError(f"{path}: expected ns_schedules to be a list of coefficients, each of at most 100 steps, got something else")


def _triples(steps: Any) -> bool:
    return (
        isinstance(steps, list)
        and len(steps) <= 100
        and all(isinstance(step, list) and len(step) == 3 and all(type(c) in (int, float) for c in step) for step in steps)
    )
