"""The same values in chunks of another shape: for writing, for reading, and as this version of the format has them.

The copy lies beside the original, with the other of the two separators in its chunks' keys, until one commit changes over.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import ceil
from typing import TypeAlias

from .files import Files, remove_chunks
from .open_array import OpenArray
from .reading import read_rows
from .stored_array import StoredArray

SHARD_STEPS = 1024  # also the number of records beyond which arrays are compacted
INNER_MATRICES = 8
AT_ONCE = (
    2**26
)  # bytes of copies after which there is a commit: until then they lie beside the originals, and are lost work where it is cut off

Change: TypeAlias = tuple[dict[str, OpenArray], str, OpenArray]  # a group's arrays, the name of one of them, and what takes its place


def is_for_writing(array: StoredArray, chunk_steps: int) -> bool:
    """Whether a writer can go on with an array as it lies there: a chunk for so many records in each file, made as :func:`codecs.encode` makes it."""
    return not array.sharded and array.compression == "blosc" and array.checksum and (not array.has_steps or array.shard[0] == chunk_steps)


def for_writing(array: StoredArray, chunk_steps: int) -> OpenArray:
    """An array of the same values in one chunk for so many records; not yet written. One without steps has a chunk of its length."""
    first = chunk_steps if array.has_steps else array.shape[0]
    chunk = (first, *array.shape[1:])
    return _beside(array, chunk, chunk, sharded=False)


def for_reading(array: StoredArray) -> OpenArray:
    """An array of the same values in shards in which the history of a matrix lies together; not yet written."""
    _, matrices, *extra = array.shape
    padded = ceil(matrices / INNER_MATRICES) * INNER_MATRICES
    return _beside(array, (SHARD_STEPS, INNER_MATRICES, *extra), (SHARD_STEPS, padded, *extra), sharded=True)


def _beside(array: StoredArray, chunk: tuple[int, ...], shard: tuple[int, ...], *, sharded: bool) -> OpenArray:
    chunk, shard = (tuple(max(size, 1) for size in lengths) for lengths in (chunk, shard))
    separator = "/" if array.separator == "." else "."
    made = replace(array, chunk=chunk, shard=shard, sharded=sharded, compression="blosc", checksum=True, separator=separator, written=None)
    return OpenArray(made)


def copy(files: Files, old: OpenArray, new: OpenArray) -> None:
    """Write the chunks of `new` from the values of `old`, as many records at a time in memory as a file of either holds.

    Raises:
        RunError: `old` is damaged; told without the run.
    """
    source, length, count = old.to_read(), new.stored.shard[0], new.stored.shape[0]
    # A shard is read once, whatever number of chunks is made of it.
    piece = source.shard[0]
    span = min(piece, ceil(count / length) * length) if piece % length == 0 else length
    for start in range(0, count, span):
        block = read_rows(files.root, source, start, min(start + span, count))
        for row in range(0, len(block), length):
            new.write(files, (start + row) // length, block[row : row + length], always=not new.stored.has_steps)


def lay_out(
    files: Files, changes: Iterable[Change], commit: Callable[[], None], let_go: Callable[[Sequence[OpenArray]], None], at_once: float
) -> None:
    """Make copies, and change over to them by a commit whenever they have so many bytes, and at the end. Wherever that is cut off, one or the other is in force, whole.

    Args:
        files: of the run.
        changes: what is to be copied.
        commit: commits the arrays as they now are.
        let_go: removes the files of those that were copied.
        at_once: bytes.

    Raises:
        RunError: one is damaged; told without the run. It stays as it is, as do those that were not changed over before.
        OSError: there is no room for the copies; as before.
    """
    copied: list[Change] = []
    begun = files.bytes_written
    for change in changes:
        arrays, name, new = change
        copied.append(change)
        try:
            copy(files, arrays[name], new)
        except Exception:
            for _, _, other in copied:  # on a full disk their bytes are what another file needs
                remove_chunks(files, other.stored.path, other.stored.separator)
            raise
        if files.bytes_written - begun >= at_once:
            _change_over(copied, commit, let_go)
            copied, begun = [], files.bytes_written
    if copied:
        _change_over(copied, commit, let_go)


def _change_over(copied: Sequence[Change], commit: Callable[[], None], let_go: Callable[[Sequence[OpenArray]], None]) -> None:
    before = [arrays[name] for arrays, name, _ in copied]
    try:
        for arrays, name, new in copied:
            arrays[name] = new
        commit()
    except BaseException:
        # Also where it was committed and an interrupt came right after: the next commit changes back, all files being there.
        for (arrays, name, _), old in zip(copied, before, strict=True):
            arrays[name] = old
        raise
    let_go(before)
