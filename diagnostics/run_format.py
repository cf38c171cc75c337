"""What writer and readers of a run agree on beside Zarr itself: the seal of a commit, and which chunks it holds (docs/store.md)."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


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
    return [number for number in range(bits.bit_length()) if bits >> number & 1]
