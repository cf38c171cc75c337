"""One chunk's values as bytes, and the metadata that tells any Zarr reader how they were made.

The codecs are Zarr's own; they are called without its machinery for storage of all kinds, which takes longer than they do.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import BITSHUFFLE, Blosc
from numpy.typing import NDArray

# On spectra rounded to 12 bits: 1.85 bytes a value and 0.22 ms a record of 51 kB, where plain Zstandard takes 2.6 and 0.54.
LEVEL = 3
ABSENT = 2**64 - 1  # in the place of offset and size of an inner chunk that is not there


def encode(values: NDArray[Any]) -> bytes:
    """A chunk: bytes (little-endian; texts as vlen-utf8) → Blosc (bit shuffle, Zstandard) → CRC-32C of that behind it."""
    plain = _texts(values) if values.dtype.kind == "T" else np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    packed: bytes = Blosc("zstd", LEVEL, BITSHUFFLE, typesize=_typesize(values.dtype)).encode(plain)
    return packed + struct.pack("<I", google_crc32c.value(packed))


def encode_shard(values: NDArray[Any], inner: Sequence[int], missing: Any) -> Iterator[bytes]:
    """Inner chunks one behind the other, in row-major order, then the offset and size of each with a CRC-32C: Zarr's `sharding_indexed`.

    One inner chunk at a time is in memory beside the values. Those of missing values alone are left out.
    """
    index, offset = [], 0
    for place in np.ndindex(*(size // length for size, length in zip(values.shape, inner, strict=True))):
        part = values[tuple(slice(i * length, (i + 1) * length) for i, length in zip(place, inner, strict=True))]
        if all_missing(part, missing):
            index.append((ABSENT, ABSENT))
            continue
        content = encode(part)
        index.append((offset, len(content)))
        offset += len(content)
        yield content
    table = np.array(index, dtype="<u8").tobytes()
    yield table + struct.pack("<I", google_crc32c.value(table))


def all_missing(values: NDArray[Any], missing: Any) -> bool:
    """Whether there is nothing but missing values."""
    if missing != missing:
        return bool(np.isnan(values.flat[0])) and bool(np.isnan(values).all())
    return bool((values == missing).all())


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
    *,
    separator: str = "/",
    inner: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Metadata of an array, Zarr v3, its chunks at `c`, then their place in the grid, with `separator` between; with `inner`, they are shards of such chunks."""
    if inner is None:
        made_by = codecs(dtype)
    else:
        index_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        shards = {"chunk_shape": list(inner), "codecs": codecs(dtype), "index_codecs": index_codecs, "index_location": "end"}
        made_by = [{"name": "sharding_indexed", "configuration": shards}]
    return {
        "shape": list(shape),
        "data_type": "string" if dtype.kind == "T" else dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": separator}},
        "fill_value": "NaN" if missing != missing else missing,
        "codecs": made_by,
        "attributes": attributes,
        "dimension_names": list(dimensions),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
