"""One chunk's values as bytes, and the metadata that tells any Zarr reader how they were made.

The codecs are Zarr's own; they are called without its machinery for storage of all kinds, which takes longer than they do.
"""

import struct
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import BITSHUFFLE, Blosc
from numpy.typing import NDArray

# On spectra rounded to 12 bits: 1.85 bytes a value and 0.22 ms a record of 51 kB, where plain Zstandard takes 2.6 and 0.54.
LEVEL = 3


def encode(values: NDArray[Any]) -> bytes:
    """A chunk: bytes (little-endian; texts as vlen-utf8) → Blosc (bit shuffle, Zstandard) → CRC-32C of that behind it."""
    plain = _texts(values) if values.dtype.kind == "T" else np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    packed: bytes = Blosc("zstd", LEVEL, BITSHUFFLE, typesize=_typesize(values.dtype)).encode(plain)
    return packed + struct.pack("<I", google_crc32c.value(packed))


def _texts(values: NDArray[Any]) -> bytes:
    texts = [text.encode() for text in values.ravel().tolist()]
    return struct.pack("<I", len(texts)) + b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _typesize(dtype: np.dtype[Any]) -> int:
    return 1 if dtype.kind == "T" else dtype.itemsize


def codecs(dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """The codecs of :func:`encode` as in an array's metadata."""
    if dtype.kind == "T":
        first: dict[str, Any] = {"name": "vlen-utf8", "configuration": {}}
    elif dtype.itemsize == 1:
        first = {"name": "bytes"}
    else:
        first = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {"typesize": _typesize(dtype), "cname": "zstd", "clevel": LEVEL, "shuffle": "bitshuffle", "blocksize": 0}
    return [first, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]


def array_document(
    shape: Sequence[int],
    chunk: Sequence[int],
    dtype: np.dtype[Any],
    missing: Any,
    dimensions: Sequence[str],
    attributes: dict[str, Any],
) -> dict[str, Any]:
    """Metadata of an array, Zarr v3."""
    return {
        "shape": list(shape),
        "data_type": "string" if dtype.kind == "T" else dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if missing != missing else missing,
        "codecs": codecs(dtype),
        "attributes": attributes,
        "dimension_names": list(dimensions),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
