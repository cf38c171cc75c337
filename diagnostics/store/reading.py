"""Files of a run: read if they are plain files of a believable size, and decoded after what they say of themselves has been checked."""

import os
import stat
import struct
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from .checked_array import StoredArray

_NONE = 2**64 - 1  # in a shard's index, of a chunk that is not there
_ZSTD, _BLOSC, _TEXTS = Zstd(), Blosc(), VLenUTF8()


def open_inside(folder: Path, key: str) -> BinaryIO | None:
    """The file `key` of a folder, whose own path holds no link; None where there is no such file.

    Raises:
        ValueError: it is a link, leads through one, or is no plain file.
    """
    path = os.path.join(folder, key)
    if os.path.realpath(path) != path:
        raise ValueError(f"{key}: expected a file within the run, got a link")
    try:
        # A pipe would be waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{key}: expected a file, got something else")
    return os.fdopen(descriptor, "rb")


def read_file(folder: Path, key: str, most: int) -> bytes | None:
    """What is in a file, as :func:`open_inside`.

    Raises:
        ValueError: it has more than `most` bytes.
    """
    file = open_inside(folder, key)
    if file is None:
        return None
    with file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{key}: expected at most {most:,} bytes, got {size:,}")
        return file.read(most)


def read_chunks(folder: Path, array: StoredArray, numbers: tuple[int, ...], wanted: list[tuple[int, ...]]) -> Iterator[NDArray[Any] | None]:
    """Some chunks of one file, one at a time: `numbers` are the file's, `wanted` those of chunks within it; None where one is not there.

    Raises:
        ValueError: the file or a chunk in it is damaged, or there is no file where one must be.
    """
    key = array.key(numbers)
    file = open_inside(folder, key)
    if file is None:
        if array.expects(numbers):
            raise ValueError(
                f"{key}: expected a file, got none; if the run was written to since it was opened, open it again, else it is damaged"
            )
        yield from [None] * len(wanted)
        return
    with file:
        yield from decode_file(file, key, array, wanted)


def decode_file(
    file: BinaryIO, key: str, array: StoredArray, wanted: Iterable[tuple[int, ...]] | None = None
) -> Iterator[NDArray[Any] | None]:
    """Chunks of an open file, by default all, one after the other.

    Raises:
        ValueError: the file or one of them is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    if not array.sharded:
        yield decode(key, array, _within(file, key, 0, size, size, array))
        return
    per_shard = tuple(outer // inner for outer, inner in zip(array.shard, array.chunk, strict=True))
    index = _index(file, key, size, per_shard)
    for place in np.ndindex(*per_shard) if wanted is None else wanted:
        start, length = map(int, index[place])
        if start == length == _NONE:
            yield None
        else:
            inner = f"{key} (chunk {', '.join(map(str, place))})"
            yield decode(inner, array, _within(file, inner, start, length, size, array))


def _index(file: BinaryIO, key: str, size: int, per_shard: tuple[int, ...]) -> NDArray[np.uint64]:
    """Start and length of every chunk of a shard, which stand at its end."""
    length = 16 * prod(per_shard) + 4
    if size < length:
        raise ValueError(f"{key}: expected a shard of at least {length:,} bytes, got {size:,}: it is cut short")
    file.seek(size - length)
    content = file.read(length)
    _check(key, content)
    return np.frombuffer(content[:-4], "<u8").reshape(*per_shard, 2)


def _within(file: BinaryIO, key: str, start: int, length: int, size: int, array: StoredArray) -> bytes:
    # What does not get smaller is stored as it is, with a few bytes around each block.
    most = array.chunk_bytes + array.chunk_bytes // 64 + 4096
    if length > most or start + length > size:
        raise ValueError(f"{key}: expected at most {most:,} bytes within a file of {size:,}, got {length:,} from {start:,} on")
    file.seek(start)
    return file.read(length)


def decode(key: str, array: StoredArray, content: bytes) -> NDArray[Any]:
    """A chunk of an array from its bytes.

    Raises:
        ValueError: it is damaged, or would become larger than the array's metadata say.
    """
    if array.checksum:
        _check(key, content)
        content = content[:-4]
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
        raise ValueError(f"{key}: the chunk is damaged ({error})") from None


def _check(key: str, content: bytes) -> None:
    if len(content) < 4 or google_crc32c.value(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise ValueError(f"{key}: the chunk is damaged (its checksum is of something else)")


def _texts(content: bytes, shape: tuple[int, ...]) -> NDArray[Any]:
    """Texts, each after its length, after their number."""
    count = int.from_bytes(content[:4], "little")
    if count != prod(shape) or len(content) < 4 + 4 * count:
        raise ValueError(f"{count:,} texts of {prod(shape):,}")
    return np.asarray(_TEXTS.decode(content).astype(np.dtypes.StringDType())).reshape(shape)


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
