"""Files of a run, each put into place whole by one rename."""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

METADATA = "zarr.json"


def replace_file(target: Path, content: Iterable[bytes], partial: Path, mode: int | None = None) -> int:
    """Make `target` a file of these pieces. Whoever looks sees all of the one before, or all of this one; a process that is killed leaves `partial`.

    Args:
        target: its folder is made if it is not there.
        content: pieces, one at a time in memory.
        partial: a name on the same file system that nobody else uses. Nothing is written through a link that somebody laid there.
        mode: permissions; by default those that new files have.

    Returns:
        How many bytes it has.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    file = partial.open("xb")
    try:
        with file:
            file.writelines(content)
            size = file.tell()
        if mode is not None:
            partial.chmod(mode)
        try:
            os.replace(partial, target)
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, target)
    except Exception:
        with suppress(OSError):
            partial.unlink()  # on a full disk its bytes are what another file needs
        raise
    return size


def json_bytes(document: Any) -> bytes:
    """A metadata document as it is written."""
    return json.dumps(document, separators=(",", ":")).encode()


class Files:
    """Writes files below one folder.

    Attributes:
        root: the folder.
        bytes_written: how much was written, for what it costs.
    """

    def __init__(self, root: Path, writer: str) -> None:
        """`writer` is in the names of the unfinished files, so that those of two writers differ."""
        self.root = root
        self.bytes_written = 0
        self._writer = writer
        self._numbers = count()  # no generator: an exception of a signal handler would end it, and with it every later write

    def replace(self, path: str, content: Iterable[bytes]) -> None:
        """Make `path` (below the root) a file of these pieces, as :func:`replace_file`."""
        self.bytes_written += replace_file(self.root / path, content, self.root / f".{self._writer}.{next(self._numbers)}.partial")

    def replace_document(self, path: str, document: dict[str, Any]) -> None:
        """Make `path` a metadata document."""
        self.replace(f"{path}/{METADATA}" if path else METADATA, [json_bytes(document)])

    def remove(self, path: str) -> None:
        """Remove a file, or a folder and all that is in it; nothing is done where there is none."""
        target = self.root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def signature(self) -> tuple[int, int, int]:
        """What tells the root's document from any other that is put into its place."""
        status = (self.root / METADATA).stat()
        return status.st_ino, status.st_mtime_ns, status.st_size


def remove_chunks(files: Files, path: str, separator: str) -> None:
    """Remove all chunks of an array that lie there with this separator in their keys."""
    for entry in (files.root / path).glob("c" if separator == "/" else "c.*"):
        files.remove(f"{path}/{entry.name}")
