"""The same values in chunks of another shape: for writing, for reading, and as this version of the format has them.

The copy lies beside the original, with the other of the two separators in its chunks' keys, until one commit changes over.
"""

from math import ceil

from .codecs import array_document
from .files import Files
from .record_group import Read
from .stored_array import StoredArray

SHARD_STEPS = 1024  # also the number of records beyond which arrays are compacted
INNER_MATRICES = 8


def for_writing(array: StoredArray, chunk_steps: int) -> StoredArray:
    """An array of the same values in one chunk for so many records; not yet written. One without steps has a chunk of its length."""
    first = chunk_steps if array.has_steps else array.shape[0]
    return _beside(array, (first, *array.shape[1:]))


def for_reading(array: StoredArray) -> StoredArray:
    """An array of the same values in shards in which the history of a matrix lies together; not yet written."""
    _, matrices, *extra = array.shape
    padded = ceil(matrices / INNER_MATRICES) * INNER_MATRICES
    return _beside(array, (SHARD_STEPS, padded, *extra), (SHARD_STEPS, INNER_MATRICES, *extra))


def _beside(array: StoredArray, chunk: tuple[int, ...], inner: tuple[int, ...] | None = None) -> StoredArray:
    document = array.document
    separator = "/" if array.separator == "." else "."
    names, attributes = document["dimension_names"], document["attributes"]
    chunk = tuple(max(size, 1) for size in chunk)
    made = array_document(array.shape, chunk, array.dtype, document["fill_value"], names, attributes, separator=separator, inner=inner)
    return StoredArray(array.path, made)


def copy(files: Files, old: StoredArray, new: StoredArray, read: Read) -> None:
    """Write the chunks of `new` from the values of `old`: one chunk, or one shard, at a time in memory."""
    length, piece, count = new.chunk[0], old.chunk[0], new.shape[0]
    # A shard is read once, whatever number of chunks is made of it.
    span = min(piece, ceil(count / length) * length) if piece % length == 0 else length
    for start in range(0, count, span):
        block = new.empty(span)
        stop = min(start + span, count)
        for first in range(start, stop, piece):
            last = min(first + piece, stop)
            block[first - start : last - start] = read(old, first, last)
        for row in range(start, stop, length):
            new.write(files, row // length, block[row - start : row - start + length], always=not new.has_steps)
