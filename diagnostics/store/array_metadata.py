"""Metadata of an array as Zarr v3 has it, made and read: the kinds that a recorder writes, of sizes that a run can have. All else is refused."""

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import numpy as np

from .bounds import MAX_ALONG, MAX_CELLS, MAX_CHUNK, MAX_FILES, MAX_MATRICES, MAX_RECORDS, MAX_SHARDED, MAX_TEXT
from .codecs import codecs
from .run_error import RunError
from .stored_array import StoredArray

_KINDS = {
    "bool": "?",
    "int8": "i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "uint8": "u1",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
}
_KEYS = {
    "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs", "attributes", "dimension_names", "zarr_format",
    "node_type", "storage_transformers",
}  # fmt: skip


def array_document(array: StoredArray) -> dict[str, Any]:
    """Metadata of an array whose chunks :func:`codecs.encode` makes, at `c` and then their place in the grid; those of shards lie in them one after the other."""
    made_by = codecs(array.in_memory)
    if array.sharded:
        index_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        shards = {"chunk_shape": list(array.chunk), "codecs": made_by, "index_codecs": index_codecs, "index_location": "end"}
        made_by = [{"name": "sharding_indexed", "configuration": shards}]
    return {
        "shape": list(array.shape),
        "data_type": "string" if array.dtype is None else array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": array.separator}},
        "fill_value": _fill_value(array),
        "codecs": made_by,
        "attributes": dict(array.attributes),
        "dimension_names": list(array.dimensions),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _fill_value(array: StoredArray) -> Any:
    if array.dtype is None:
        return array.fill
    fill = array.fill.item()
    return fill if array.dtype.kind != "f" or np.isfinite(fill) else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(fill)]


def stored_array(path: str, node: Mapping[str, Any], written: Collection[int] | None = None) -> StoredArray:
    """The array of which `node` is the metadata.

    Raises:
        RunError: it is none that a recorder writes; told without the run.
    """
    try:
        return _checked(path, node, written)
    except RunError:
        raise
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise RunError(f"expected the metadata of an array, got one without a part or of another kind ({error!r:.80})", file=path) from None


def _checked(path: str, node: Mapping[str, Any], written: Collection[int] | None) -> StoredArray:
    _expect(path, "keys of an array's metadata", set(node) <= _KEYS, sorted(set(node) - _KEYS))
    _expect(path, "no storage transformers", node.get("storage_transformers", []) == [], node.get("storage_transformers"))
    kind = node["data_type"]
    _expect(path, f"one of the data types {', '.join(_KINDS)} and string", isinstance(kind, str) and kind in {*_KINDS, "string"}, kind)
    dtype = None if kind == "string" else np.dtype(_KINDS[kind])
    dimensions = tuple(node["dimension_names"])
    named = all(isinstance(name, str) and 0 < len(name) < 100 for name in dimensions) and len(set(dimensions)) == len(dimensions)
    _expect(
        path, "one to three dimensions with different names", named and 0 < len(dimensions) < 4 and "step" not in dimensions[1:], dimensions
    )
    shape = _sizes(path, "shape", node["shape"], len(dimensions))
    for name, size in zip(dimensions, shape, strict=True):
        most = {"step": MAX_RECORDS, "matrix": MAX_MATRICES}.get(name, MAX_ALONG)
        _expect(path, f"at most {most:,} along {name}", size <= most, size)
    _expect(path, f"at most {MAX_CELLS:,} records times matrices", prod(shape[:2]) <= MAX_CELLS, shape)
    _expect(path, "a regular chunk grid", node["chunk_grid"]["name"] == "regular", node["chunk_grid"]["name"])
    shard = _sizes(path, "chunk shape", node["chunk_grid"]["configuration"]["chunk_shape"], len(shape))
    files = prod(-(-size // length) for size, length in zip(shape, shard, strict=True))
    _expect(path, f"at most {MAX_FILES:,} chunks", files <= MAX_FILES, files)
    encoding = node["chunk_key_encoding"]
    separator = encoding.get("configuration", {}).get("separator", "/")
    _expect(path, "the default key encoding", encoding["name"] == "default" and separator in ("/", "."), encoding)
    chunk, codecs = shard, node["codecs"]
    sharded = codecs[0]["name"] == "sharding_indexed"
    if sharded:
        inside = codecs[0]["configuration"]
        chunk, index, where = (
            _sizes(path, "chunk shape", inside["chunk_shape"], len(shape)),
            inside["index_codecs"],
            inside["index_location"],
        )
        _expect(path, "shards alone", len(codecs) == 1 and dtype is not None, codecs[1:])
        _expect(path, "a shard's index at its end, with a checksum", where == "end" and _chain(index) == ["bytes", "crc32c"], index)
        whole = all(outer % inner == 0 for outer, inner in zip(shard, chunk, strict=True))
        _expect(path, f"shards of at most {MAX_SHARDED:,} whole chunks", whole and prod(shard) // prod(chunk) <= MAX_SHARDED, shard)
        codecs = inside["codecs"]
    chain = _chain(codecs)
    first, checksum = ("vlen-utf8" if dtype is None else "bytes"), chain[-1:] == ["crc32c"]
    compression = chain[1] if len(chain) > 1 + checksum else None
    allowed = [first, *([compression] if compression in ("zstd", "blosc") else []), *(["crc32c"] if checksum else [])]
    _expect(path, f"the codecs {first}, zstd or blosc, and crc32c", chain == allowed, chain)
    most = MAX_TEXT if dtype is None else MAX_CHUNK
    _expect(path, f"chunks of at most {most:,} bytes", prod(chunk) * (4 if dtype is None else dtype.itemsize) <= most, chunk)
    attributes = node["attributes"]
    _expect(path, "texts as attributes", all(isinstance(value, (str, int, float)) for value in attributes.values()), attributes)
    return StoredArray(
        path, shape, dimensions, dtype, _fill(path, node["fill_value"], dtype), attributes, chunk, shard, sharded, compression, checksum, separator,
        written,
    )  # fmt: skip


def _chain(codecs: Any) -> list[Any]:
    """The names of codecs; numbers little-endian."""
    for codec in codecs:
        if codec["name"] == "bytes" and codec.get("configuration", {}).get("endian", "little") != "little":
            raise TypeError("big-endian numbers")
    return [codec["name"] for codec in codecs]


def _sizes(path: str, what: str, given: Any, dimensions: int) -> tuple[int, ...]:
    least = 0 if what == "shape" else 1
    whole = isinstance(given, list) and len(given) == dimensions and all(type(size) is int and least <= size < 2**31 for size in given)
    _expect(path, f"{dimensions} whole numbers as {what}", whole, given)
    return tuple(given)


def _fill(path: str, given: Any, dtype: np.dtype[Any] | None) -> Any:
    """A fill value as Zarr writes it."""
    if dtype is None:
        _expect(path, "a text as fill value", isinstance(given, str) and len(given) < 100, given)
        return given
    if dtype.kind == "f" and given in ("NaN", "Infinity", "-Infinity"):
        return dtype.type(given)
    _expect(path, "a number as fill value", isinstance(given, bool) if dtype.kind == "b" else type(given) in (int, float), given)
    if dtype.kind != "f":
        return dtype.type(given)
    with np.errstate(over="ignore"):
        return np.array(given).astype(dtype)[()]


def _expect(path: str, expected: str, holds: bool, got: Any) -> None:
    if not holds:
        raise RunError(f"expected {expected}; got {got!r:.80}", file=path)
