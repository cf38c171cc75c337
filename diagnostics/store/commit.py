"""The document that makes a commit: the metadata of all groups and arrays, which chunks they have, and a seal on it."""

import json
from collections.abc import Mapping
from typing import Any

from .format import chunk_map, consolidated, seal
from .record_group import RecordGroup

Nodes = dict[str, dict[str, Any]]


def nodes_of(attributes: Mapping[str, Mapping[str, Any]], groups: Mapping[str, RecordGroup]) -> Nodes:
    """The documents of all groups and arrays, by path; `attributes` are those of the groups, "" of the run."""
    nodes: Nodes = {}
    for name in sorted(name for name in attributes if name):
        nodes[name] = group_document(attributes[name])
        if name in groups:  # the others hold groups alone
            nodes |= {array.path: array.document for _, array in sorted((groups[name].static | groups[name].arrays).items())}
    return nodes


def root_document(attributes: Mapping[str, Any], nodes: Nodes, groups: Mapping[str, RecordGroup]) -> dict[str, Any]:
    """The root's document with all others in it, as `zarr.consolidate_metadata` would write it, sealed.

    (Zarr's own warns that the format may change; silencing that would reset the warning filters of the training process at every flush.)
    """
    inner = {path: {**node, **consolidated({})} if node["node_type"] == "group" else node for path, node in nodes.items()}
    chunks = {array.path: chunk_map(array.committed()) for group in groups.values() for array in group.arrays.values()}
    root = {**group_document({**attributes, "chunks": chunks}), **consolidated(inner)}
    root["attributes"]["checksum"] = seal(root)
    return root


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A group's own document."""
    # As it reads back: a key that is no text becomes one, and the seal is of that.
    return {"attributes": json.loads(json.dumps(attributes)), "zarr_format": 3, "node_type": "group"}
