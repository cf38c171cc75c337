"""One chunk's values as bytes and back, and the metadata that tells any Zarr reader how they were made.

The codecs are Zarr's own; they are called without its machinery for storage of all kinds, which takes longer than they do. What is decoded may be a
stranger's: what it says of its size is looked at first, and it has no more room than the array's metadata give it.
"""

import struct
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import BITSHUFFLE, Blosc
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from .run_error import RunError
from .stored_array import StoredArray

# On spectra rounded to 12 bits: 1.85 bytes a value and 0.22 ms a record of 51 kB, where plain Zstandard takes 2.6 and 0.54.
LEVEL = 3
ABSENT = 2**64 - 1  # in the place of offset and size of an inner chunk that is not there
_ZSTD, _BLOSC, _TEXTS = Zstd(), Blosc(), VLenUTF8()


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


def encode(values: NDArray[Any]) -> bytes:
    """A chunk: bytes (little-endian; texts as vlen-utf8) → Blosc (bit shuffle, Zstandard) → CRC-32C of that after it."""
    plain = _text_bytes(values) if values.dtype.kind == "T" else np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return _with_checksum(Blosc("zstd", LEVEL, BITSHUFFLE, typesize=_typesize(values.dtype)).encode(plain))


def decode(key: str, array: StoredArray, content: bytes) -> NDArray[Any]:
    """A chunk of an array from its bytes, made by :func:`encode` or by the first version (plain Zstandard, no checksum).

    Raises:
        RunError: it is damaged, or would become larger than the array's metadata say.
    """
    if array.checksum:
        content = _without_checksum(key, content)
    try:
        if array.compression is None:
            decoded: Any = np.frombuffer(content, np.uint8)
        else:
            size = _blosc_size(content) if array.compression == "blosc" else _zstd_size(content)
            if size > array.chunk_bytes:
                raise ValueError(f"it would become {size:,} bytes of {array.chunk_bytes:,}")
            decoded = np.empty(size, np.uint8)
            (_BLOSC if array.compression == "blosc" else _ZSTD).decode(content, out=decoded)
        if array.dtype is None:
            return _texts(decoded.tobytes(), array.chunk)
        if len(decoded) != array.chunk_bytes:
            raise ValueError(f"{len(decoded):,} bytes of {array.chunk_bytes:,}")
        if array.dtype.kind == "b":
            return np.asarray(decoded.reshape(array.chunk) != 0)
        return np.asarray(decoded.view(array.dtype).reshape(array.chunk))
    except (ValueError, RuntimeError, SystemError, MemoryError, struct.error) as error:
        raise RunError(f"the chunk is damaged ({error})", file=key) from None


def encode_shard(values: NDArray[Any], inner: Sequence[int], missing: Any) -> Iterator[bytes]:
    """Inner chunks one after the other, in row-major order, then the offset and size of each with a CRC-32C: Zarr's `sharding_indexed`.

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
    yield _with_checksum(np.array(index, dtype="<u8").tobytes())


def index_length(per_shard: Sequence[int]) -> int:
    """Bytes of the index at the end of a shard of so many chunks along each dimension."""
    return 16 * prod(per_shard) + 4


def decode_index(key: str, content: bytes, per_shard: Sequence[int]) -> NDArray[np.uint64]:
    """Offset and size of every chunk of a shard from the bytes at its end, shape (*per_shard, 2).

    Raises:
        RunError: they are damaged.
    """
    return np.frombuffer(_without_checksum(key, content), "<u8").reshape(*per_shard, 2)


def all_missing(values: NDArray[Any], missing: Any) -> bool:
    """Whether there is nothing but missing values."""
    if missing != missing:
        return bool(np.isnan(values.flat[0])) and bool(np.isnan(values).all())
    return bool((values == missing).all())


def _with_checksum(content: bytes) -> bytes:
    return content + struct.pack("<I", google_crc32c.value(content))


def _without_checksum(key: str, content: bytes) -> bytes:
    if len(content) < 4 or google_crc32c.value(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise RunError("the chunk is damaged (its checksum does not match)", file=key)
    return content[:-4]


def _text_bytes(values: NDArray[Any]) -> bytes:
    """Texts, each after its length, after their number."""
    texts = [text.encode() for text in values.ravel().tolist()]
    return struct.pack("<I", len(texts)) + b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _texts(content: bytes, shape: tuple[int, ...]) -> NDArray[Any]:
    count = int.from_bytes(content[:4], "little")
    if count != prod(shape) or len(content) < 4 + 4 * count:
        raise ValueError(f"{count:,} texts of {prod(shape):,}")
    return np.asarray(_TEXTS.decode(content).astype(np.dtypes.StringDType())).reshape(shape)


def _typesize(dtype: np.dtype[Any]) -> int:
    return 1 if dtype.kind == "T" else dtype.itemsize


def _zstd_size(content: bytes) -> int:
    """What a frame of Zstandard says it holds (RFC 8878, 3.1.1.1)."""
    magic, descriptor = struct.unpack_from("<IB", content)
    if magic != 0xFD2FB528:
        raise ValueError("no Zstandard frame")
    single = descriptor >> 5 & 1
    width = {0: single, 1: 2, 2: 4, 3: 8}[descriptor >> 6]
    if not width:
        raise ValueError("a frame that does not say how large it is")
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    if len(content) < start + width:
        raise ValueError("it is cut short")
    return int.from_bytes(content[start : start + width], "little") + (256 if width == 2 else 0)


def _blosc_size(content: bytes) -> int:
    """What a Blosc buffer says it holds; of those that Zstandard made, or that are stored as they are."""
    _, _, flags, _, size, block, length = struct.unpack_from("<BBBBIII", content)
    if length != len(content):
        raise ValueError(f"{len(content):,} bytes of {length:,}")
    if (flags >> 5 != 4 and not flags & 2) or block > max(size, 1):
        raise ValueError("not compressed by Zstandard")
    return int(size)
