"""What writer and readers of a run agree on beside Zarr itself: the seal of a commit, and which chunks it holds (docs/store.md)."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..catalogue import GROUPS, SCHEMA
from .run_error import RunError

LINEAGES = "lineages"  # the folder of what restarted trainings left, and the attribute that lists it
OF_LINEAGE = ("lineage", "after", "last_step", "records")  # what the list, and each lineage's own attributes, say of it
DAMAGED = ".damaged"  # the folder that repairing moves things into
TOP = frozenset({*GROUPS, "scalars"})  # what groups of records a run may have


def consolidated(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a group's document that holds those of the nodes below it, by path, as `zarr.consolidate_metadata` writes it."""
    return {"consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": nodes}}


def seal(document: Mapping[str, Any]) -> str:
    """Checksum of the root's metadata document, kept among its attributes as `checksum`: SHA-256 of it as JSON, without that attribute.

    The document holds the metadata of every group and array, so this covers all of a run but the chunks, which carry their own.
    """
    attributes = {key: value for key, value in document.get("attributes", {}).items() if key != "checksum"}
    text = json.dumps({**document, "attributes": attributes}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def chunk_map(written: Iterable[int]) -> str:
    """The numbers of the chunks of an array that were written, along its first dimension, as a hexadecimal bit mask.

    A chunk that is not among them holds missing values alone and has no file.

    >>> chunk_map([0, 1, 4])
    '13'
    """
    return format(sum(1 << number for number in set(written)), "x")


def chunks_written(mask: str) -> list[int]:
    """The numbers in a :func:`chunk_map`, ascending.

    Raises:
        ValueError: it is none.

    >>> chunks_written("13")
    [0, 1, 4]
    """
    bits = int(mask, 16)
    if bits < 0:
        raise ValueError(f"mask: expected hexadecimal digits, got {mask!r}")
    return [number for number, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]


def schema_of(attributes: Any) -> int | None:
    """The schema version that a run's attributes tell, None where they are not those of a run.

    >>> schema_of({"optiscope_schema": 1}), schema_of({"optiscope_schema": True}), schema_of([])
    (1, None, None)
    """
    schema = attributes.get("optiscope_schema") if isinstance(attributes, Mapping) else None
    return schema if type(schema) is int and schema >= 1 else None


def newer_schema(attributes: Mapping[str, Any]) -> RunError | None:
    """Why a run cannot be read whose schema this version does not know yet; None where it knows it.

    >>> newer_schema({"optiscope_schema": 1000, "versions": {"optiscope": "9.0.1"}}).reason
    'was written by optiscope 9.0.1 with schema 1000'
    """
    schema = schema_of(attributes)
    if schema is None or schema <= SCHEMA:
        return None
    # Whoever recorded last set the schema.
    sessions = attributes.get("continued")
    last = sessions[-1] if isinstance(sessions, list) and sessions else attributes
    versions = last.get("versions") if isinstance(last, Mapping) else None
    version = versions.get("optiscope") if isinstance(versions, Mapping) else None
    known = isinstance(version, str) and re.fullmatch(r"[0-9][0-9a-z.+]{0,40}", version)
    by, what = (f"optiscope {version}", f"optiscope>={version}") if known else ("a newer optiscope", "a newer one")
    return RunError(f"was written by {by} with schema {schema}", advice=f"this version reads up to {SCHEMA}: install {what}")
