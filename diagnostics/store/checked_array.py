"""What an array of a run may be: the kinds that the recorder writes, of sizes that a run can have. All else is refused before anything is read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A run of 80 layers has some 10⁴ records of 600 matrices; these are far from it, and what they allow fits in memory.
MAX_RECORDS, MAX_MATRICES, MAX_CELLS = 10_000_000, 100_000, 200_000_000  # cells: records times matrices of a group
MAX_ALONG = 256  # any other dimension: tiles of a map are most
MAX_CHUNK = 2**29  # bytes of a chunk, decoded
MAX_TEXT = 2**24  # of all texts of an array
MAX_FILES = 400_000  # of an array
MAX_SHARDED = 2**16  # chunks in a shard

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


@dataclass(frozen=True)
class StoredArray:
    """An array as its metadata describe it, checked.

    Attributes:
        path: within the run: "geometry/fro_norm".
        shape: committed.
        dimensions: a name for each.
        dtype: little-endian; None for texts.
        fill: what stands where no chunk is.
        attributes: texts for readers.
        chunk: shape of what is decoded at once.
        shard: shape of what one file holds.
        sharded: whether a file holds an index behind its chunks, be it one chunk; else it is one chunk.
        compression: "blosc", "zstd" or None.
        checksum: CRC-32C after each chunk.
        separator: of the numbers in a chunk's key.
        written: numbers of the files that there must be, in the row-major order of their grid; None where that is not known.
    """

    path: str
    shape: tuple[int, ...]
    dimensions: tuple[str, ...]
    dtype: np.dtype[Any] | None
    fill: Any
    attributes: Mapping[str, Any]
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    sharded: bool
    compression: str | None
    checksum: bool
    separator: str
    written: Collection[int] | None

    @property
    def grid(self) -> tuple[int, ...]:
        """Files along each dimension."""
        return tuple(-(-size // length) for size, length in zip(self.shape, self.shard, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk; of texts the most that one may have, so that all of an array's are bounded."""
        return MAX_TEXT // max(prod(self.grid), 1) if self.dtype is None else prod(self.chunk) * self.dtype.itemsize

    def key(self, numbers: tuple[int, ...]) -> str:
        """The file of a chunk or shard, within the run."""
        return f"{self.path}/{self.separator.join(map(str, ('c', *numbers)))}"

    def numbers(self, file: str) -> tuple[int, ...] | None:
        """Of a chunk or shard by its file, as :meth:`key` names it; None where the file is none that the array can have."""
        numbers = file.removeprefix(f"{self.path}/c").replace(".", "/").strip("/").split("/")
        if len(numbers) != len(self.shape) or not all(number.isdecimal() and len(number) < 10 for number in numbers):
            return None
        found = tuple(map(int, numbers))
        return found if self.key(found) == file and all(n < size for n, size in zip(found, self.grid, strict=True)) else None

    def place(self, numbers: tuple[int, ...]) -> int:
        """The number of a file in the row-major order of their grid, by which the map of chunks knows it."""
        return int(np.ravel_multi_index(numbers, self.grid))

    def expects(self, numbers: tuple[int, ...]) -> bool:
        """Whether the file must be there. Steps are never missing; of all else, that is known by the map of chunks alone."""
        if self.written is None:
            return self.path.endswith("/step")
        return self.place(numbers) in self.written

    def files_among(self, along: Sequence[Collection[int]]) -> Iterator[tuple[int, ...]]:
        """Of the files whose numbers along each dimension are given, those that may be there; what was not written holds missing values alone."""
        if self.written is None or prod(map(len, along)) <= len(self.written):
            for numbers in product(*along):
                if self.written is None or self.expects(numbers):
                    yield numbers
            return
        for number in sorted(self.written):
            numbers = tuple(map(int, np.unravel_index(number, self.grid)))
            if all(n in given for n, given in zip(numbers, along, strict=True)):
                yield numbers

    def empty(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array of `shape` in which everything is missing."""
        return np.full(shape, self.fill, np.dtypes.StringDType() if self.dtype is None else self.dtype)


def stored_array(path: str, node: Mapping[str, Any], written: Collection[int] | None = None) -> StoredArray:
    """The array of which `node` is the metadata.

    Raises:
        ValueError: it is none that a recorder writes; told without the run.
    """
    try:
        return _checked(path, node, written)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: expected the metadata of an array, got one without a part or of another kind ({error!r:.80})") from None


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
        raise ValueError(f"{path}: expected {expected}; got {got!r:.80}")
