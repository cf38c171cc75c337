"""Files of a run: read if they are plain files of a believable size, and decoded after what they say of themselves has been checked."""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .codecs import ABSENT, decode, decode_index, index_length
from .run_error import RunError
from .stored_array import StoredArray

Where: TypeAlias = slice | NDArray[Any]


def open_inside(folder: Path, key: str) -> BinaryIO | None:
    """The file `key` of a folder, whose own path holds no link; None where there is no such file.

    Raises:
        RunError: it is a link, leads through one, or is no plain file.
    """
    path = os.path.join(folder, key)
    if os.path.realpath(path) != path:
        raise RunError("expected a file within the run, got a link", file=key)
    try:
        # A pipe would be waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunError("expected a file, got something else", file=key)
    return os.fdopen(descriptor, "rb", buffering=0)


def read_file(folder: Path, key: str, most: int) -> bytes | None:
    """What is in a file, as :func:`open_inside`.

    Raises:
        RunError: it has more than `most` bytes.
    """
    file = open_inside(folder, key)
    if file is None:
        return None
    with file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise RunError(f"expected at most {most:,} bytes, got {size:,}", file=key)
        return _read(file, 0, size)


def read_chunks(folder: Path, array: StoredArray, numbers: tuple[int, ...], wanted: list[tuple[int, ...]]) -> Iterator[NDArray[Any] | None]:
    """Some chunks of one file, one at a time: `numbers` are the file's, `wanted` those of chunks within it; None where one is not there.

    Raises:
        RunError: the file or a chunk in it is damaged, or there is no file where one must be.
    """
    key = array.key(numbers)
    file = open_inside(folder, key)
    if file is None:
        if array.expects(numbers):
            raise RunError("expected a file, got none", file=key)
        yield from [None] * len(wanted)
        return
    with file:
        yield from decode_file(file, key, array, wanted)


def decode_file(
    file: BinaryIO, key: str, array: StoredArray, wanted: Iterable[tuple[int, ...]] | None = None
) -> Iterator[NDArray[Any] | None]:
    """Chunks of an open file, by default all, one after the other.

    Raises:
        RunError: the file or one of them is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    if not array.sharded:
        yield decode(key, array, _within(file, key, 0, size, size, array))
        return
    length = index_length(array.per_file)
    if size < length:
        raise RunError(f"expected a shard of at least {length:,} bytes, got {size:,}: it is cut short", file=key)
    index = decode_index(key, _read(file, size - length, length), array.per_file)
    for place in np.ndindex(*array.per_file) if wanted is None else wanted:
        start, length = map(int, index[place])
        if start == length == ABSENT:
            yield None
        else:
            inner = f"{key} (chunk {', '.join(map(str, place))})"
            yield decode(inner, array, _within(file, inner, start, length, size, array))


def _within(file: BinaryIO, key: str, start: int, length: int, size: int, array: StoredArray) -> bytes:
    # What does not get smaller is stored as it is, with a few bytes around each block.
    most = array.chunk_bytes + array.chunk_bytes // 64 + 4096
    if length > most or start + length > size:
        raise RunError(f"expected at most {most:,} bytes within a file of {size:,}, got {length:,} from {start:,} on", file=key)
    return _read(file, start, length)


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    """Bytes of a file, as far as it has them: a single read may stop short."""
    file.seek(start)
    content = file.read(length)
    while len(content) < length and (more := file.read(length - len(content))):
        content += more
    return content


def read(folder: Path, array: StoredArray, positions: Iterable[Any]) -> Any:
    """The elements at chosen positions of each dimension; a number instead of several takes the dimension away.

    Raises:
        RunError: a chunk that holds some of them is damaged, or is not there and must be.
        OSError: a file cannot be read.
    """
    given = list(positions)
    chosen = [np.atleast_1d(p) for p in given]
    out = array.empty(tuple(map(len, chosen)))
    places = [_places(p, length) for p, length in zip(chosen, array.chunk, strict=True)]
    per_file = array.per_file
    # By dimension and file: the chunks in it that are wanted.
    files = [_by_file(where, n) for where, n in zip(places, per_file, strict=True)]
    for numbers in array.files_among(files):
        wanted = list(product(*(held[number] for held, number in zip(files, numbers, strict=True))))
        inner = [tuple(n % f for n, f in zip(one, per_file, strict=True)) for one in wanted]
        for one, chunk in zip(wanted, read_chunks(folder, array, numbers, inner), strict=True):
            if chunk is not None:
                there, here = zip(*(where[number] for where, number in zip(places, one, strict=True)), strict=True)
                out[_grid(there)] = chunk[_grid(here)]
    return out[tuple(0 if np.ndim(p) == 0 else slice(None) for p in given)]


def read_rows(folder: Path, array: StoredArray, start: int, stop: int) -> Any:
    """:func:`read` of all elements from one number along the first dimension to another."""
    return read(folder, array, [np.arange(start, stop), *map(np.arange, array.shape[1:])])


def read_all(folder: Path, array: StoredArray) -> Any:
    """:func:`read` of all elements."""
    return read_rows(folder, array, 0, array.shape[0])


def check_all(folder: Path, array: StoredArray) -> None:
    """Read every chunk of an array, one at a time in memory.

    Raises:
        RunError: as :func:`read`.
    """
    for numbers in array.files():
        for _ in read_chunks(folder, array, numbers, list(np.ndindex(*array.per_file))):
            pass


def _by_file(chunks: Iterable[int], per_file: int) -> dict[int, list[int]]:
    return {number: list(held) for number, held in groupby(chunks, key=lambda n: n // per_file)}


def _places(positions: NDArray[Any], length: int) -> dict[int, tuple[Where, Where]]:
    """Along a dimension, by the number of the chunk, ascending: which of the chosen positions lie in it, and where in it; as slices where they follow each other."""
    if len(positions) and np.array_equal(positions, np.arange(positions[0], positions[0] + len(positions))):
        first, stop = int(positions[0]), int(positions[0]) + len(positions)
        parts = {n: (max(first, n * length), min(stop, (n + 1) * length)) for n in range(first // length, -(-stop // length))}
        return {n: (slice(a - first, b - first), slice(a - n * length, b - n * length)) for n, (a, b) in parts.items()}
    numbers = positions // length
    order = np.argsort(numbers, kind="stable")
    found, starts = np.unique(numbers[order], return_index=True)
    return {
        int(number): (part, positions[part] - number * length) for number, part in zip(found, np.split(order, starts[1:]), strict=False)
    }


def _grid(places: Sequence[Where]) -> tuple[Any, ...]:
    """An index for all combinations."""
    if all(isinstance(p, slice) for p in places):
        return tuple(places)
    return np.ix_(*(np.arange(p.start, p.stop) if isinstance(p, slice) else p for p in places))
