"""The root's document made again, where it is lost, from the documents of groups and arrays and from what lies beside them."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .array_metadata import array_document, stored_array
from .bounded_json import MAX_BYTES, parse_bounded
from .bounds import MAX_NODES
from .files import METADATA
from .format import LINEAGES, OF_LINEAGE, TOP, chunk_map, consolidated, schema_of, seal
from .reading import decode_file, open_inside, read_all, read_file
from .record_group import steps_array
from .root_document import GIVE
from .run_error import RunError
from .stored_array import StoredArray


def rebuilt(folder: Path, root: bytes, lineage: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A document of the run in `folder`. `root` is what is left of the lost one, of which the run's attributes are taken if they can be read.

    With `lineage`, of one that was left, of which the run says that; what it does not say follows from the lineage's own steps.

    A group has as many records as its steps say and, without checksums, as all of its arrays have: what was being written when a training was
    killed is left out. A chunk that is not there cannot be told from one that never was.

    Raises:
        RunError: nothing of a run is there; told without the run.
    """
    nodes = _own_documents(folder)
    if lineage is None and not any(node["node_type"] == "array" for node in nodes.values()):
        raise RunError("is not an Optiscope run", advice=GIVE)
    sealed = any(codec["name"] == "crc32c" for node in nodes.values() for codec in node.get("codecs", []))
    attributes = _attributes(root)
    if schema_of(attributes) is None:
        attributes = {"optiscope_schema": 2 if sealed else 1, "optimizers": []}
    attributes.pop("checksum", None)
    for path in [path for path, node in nodes.items() if node["node_type"] == "group"]:
        _settle(
            folder, {name: node for name, node in nodes.items() if name.rpartition("/")[0] == path and node["node_type"] == "array"}, sealed
        )
        nodes[path] = {**nodes[path], **consolidated({})}
    if sealed:
        attributes["chunks"] = {
            path: chunk_map(_there(folder, stored_array(path, node)))
            for path, node in nodes.items()
            if "step" in node.get("dimension_names", ())
        }
    if lineage is None:
        attributes |= _left(folder, attributes.pop(LINEAGES, None))
    else:
        attributes |= _extent(folder, nodes) | dict(lineage)
    document = {"attributes": attributes, "zarr_format": 3, "node_type": "group", **consolidated(nodes)}
    if schema_of(attributes) != 1:
        attributes["checksum"] = seal(document)
    return document


def _own_documents(folder: Path) -> dict[str, dict[str, Any]]:
    nodes: dict[str, dict[str, Any]] = {}
    for place, folders, files in os.walk(folder):
        path = os.path.relpath(place, folder).replace(os.sep, "/")
        folders[:] = sorted(
            name for name in folders if name[0] != "." and not (name == "c" and nodes.get(path, {}).get("node_type") == "array")
        )
        if path == ".":
            folders[:] = [name for name in folders if name in TOP]  # not another run's, nor anything else that lies in a folder
        if path == "." or METADATA not in files:
            continue
        try:
            node = parse_bounded(read_file(folder, f"{path}/{METADATA}", MAX_BYTES) or b"")
            if node["node_type"] == "array" and path.count("/") == 1:
                stored_array(path, node)
                nodes[path] = node
            elif "/" not in path and isinstance(node["attributes"], dict):
                nodes[path] = {"attributes": node["attributes"], "zarr_format": 3, "node_type": "group"}
        except (ValueError, KeyError, TypeError):
            continue
        if len(nodes) > MAX_NODES:
            raise RunError(f"expected at most {MAX_NODES:,} groups and arrays, got more", file=METADATA)
    # A group whose own document is lost is one without attributes, and its steps are as they always are.
    for group in {path.partition("/")[0] for path in nodes}:
        nodes.setdefault(group, {"attributes": {}, "zarr_format": 3, "node_type": "group"})
        if any(path.startswith(f"{group}/") for path in nodes):
            anew = (folder / group / "step" / "c.0").is_file()
            nodes.setdefault(f"{group}/step", array_document(steps_array(group, "." if anew else "/")))
    return dict(sorted(nodes.items()))


def _attributes(root: bytes) -> dict[str, Any]:
    """Those at the start of a document that is damaged further on."""
    text = root.decode(errors="replace")
    if found := re.search(r'"attributes":\s*', text):
        try:
            attributes, _ = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            return {}
        return attributes if isinstance(attributes, dict) else {}
    return {}


def _left(folder: Path, told: Any) -> dict[str, Any]:
    """The list of the lineages that there are: from their own documents, where these are whole, else as the lost one `told`, else from their steps."""
    told = told if isinstance(told, list) else []
    there = [int(one.name) for one in (folder / LINEAGES).glob("*") if one.name.isdecimal() and len(one.name) < 6]
    entries: list[Any] = []
    # One that is not there leaves the later ones, which a writer would remove if they were not listed.
    for number in range(len(told) or max(there, default=-1) + 1):
        own = folder / LINEAGES / str(number)
        content = b""
        attributes: Any = told[number] if told else None
        try:
            content = read_file(own, METADATA, MAX_BYTES) or b""
            document = parse_bounded(content)
            if document["attributes"]["checksum"] == seal(document):
                attributes = document["attributes"]
        except (ValueError, KeyError, TypeError):
            pass  # what was told of it counts
        if not _tells(attributes, number):
            attributes = rebuilt(own, content, {"lineage": number})["attributes"]
        entries.append({name: attributes[name] for name in OF_LINEAGE})
    return {LINEAGES: entries} if entries else {}


def _tells(attributes: Any, number: int) -> bool:
    held = [attributes.get(name) for name in OF_LINEAGE] if isinstance(attributes, dict) else [None]
    return held[0] == number and all(type(value) is int and value >= 0 for value in held)


def _extent(folder: Path, nodes: Mapping[str, Any]) -> dict[str, int]:
    """What is known of a lineage by its steps alone: it was left before the first of them, at the latest."""
    steps: list[Any] = []
    for path in (path for path in nodes if path.endswith("/step")):
        try:
            steps.append(read_all(folder, stored_array(path, nodes[path])))
        except ValueError:
            continue
    steps = [one for one in steps if len(one)]
    first, last = min((int(one[0]) for one in steps), default=0), max((int(one[-1]) for one in steps), default=0)
    return {"after": max(first - 1, 0), "last_step": last, "records": max(map(len, steps), default=0)}


def _settle(folder: Path, arrays: dict[str, dict[str, Any]], sealed: bool) -> None:
    """Give the arrays of a group the same lengths."""
    lengths: dict[str, int] = {}
    recorded = 0
    for path, node in arrays.items():
        for name, size in zip(node["dimension_names"], node["shape"], strict=True):
            lengths[name] = min(lengths.get(name, size), size)
        if path.endswith("/step"):
            recorded = _recorded(folder, stored_array(path, node))
    # With checksums, steps are written last, and an array's own document may be of an earlier commit.
    lengths["step"] = recorded if sealed else min(recorded, lengths.get("step", 0))
    for node in arrays.values():
        node["shape"] = [lengths[name] for name in node["dimension_names"]]


def _recorded(folder: Path, steps: StoredArray) -> int:
    """How many steps there are; those of a chunk that is damaged count as full if another follows."""
    found = number = 0
    while (file := open_inside(folder, steps.key((number,)))) is not None:
        with file:
            try:
                chunk = next(decode_file(file, steps.key((number,)), steps))
                here = 0 if chunk is None else int(np.count_nonzero(chunk >= 0))
                found = number * steps.shard[0] + here
                if here < steps.shard[0]:
                    break  # what follows was left by a training that was restarted
            except ValueError:
                found = max(found, min(steps.shape[0], (number + 1) * steps.shard[0]))
        number += 1
    return found


def _there(folder: Path, array: StoredArray) -> list[int]:
    found = []
    for place, _, files in os.walk(folder / array.path):
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        found += [numbers for name in files if (numbers := array.numbers(f"{inside}/{name}")) is not None]
    return [array.place(numbers) for numbers in found]
