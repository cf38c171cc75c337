"""A disk that fails: between this process and the files of one folder, at the operating system's boundary."""

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_BY_PATH = ("mkdir", "rmdir", "unlink", "remove", "replace", "rename", "link", "symlink", "truncate")
_BY_FILE = ("write", "pwrite", "writev", "fsync", "fdatasync", "ftruncate")


class Disk:
    """Counts what is written to a folder, and lets operations fail.

    Attributes:
        operations: how many there were: files opened for writing, writes, files renamed, removed, …
        failed: how many of them were made to fail.
    """

    def __init__(self, folder: Path, fails: Callable[[int], bool] = lambda k: False, error: int = errno.ENOSPC, torn: bool = False) -> None:
        """The k-th operation, from 1, fails where `fails(k)`, with `error`; with `torn`, half of what it was to write is written."""
        self._folder = os.path.realpath(folder)
        self._fails, self._error, self._torn = fails, error, torn
        self._lock = threading.Lock()  # Zarr writes in threads
        self._open: set[int] = set()
        self.operations = self.failed = 0

    def inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return path in self._open
        return os.path.realpath(os.fsdecode(path)).startswith(self._folder)

    def operation(self, half: Callable[[], Any] = lambda: None) -> None:
        """Count one, and fail if its turn has come."""
        with self._lock:
            self.operations += 1
            fails = self._fails(self.operations)
            self.failed += fails
        if fails:
            if self._torn:
                half()
            raise OSError(self._error, os.strerror(self._error))


@contextmanager
def on(disk: Disk) -> Iterator[Disk]:
    """Put the disk in the place of the real one."""
    opened, os_open, os_close = io.open, os.open, os.close

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+") or not disk.inside(file):
            return opened(file, mode, *args, **kwargs)
        disk.operation()
        return _File(disk, opened(file, mode, *args, **kwargs))

    def open_descriptor(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if not flags & _WRITING or not disk.inside(path):
            return os_open(path, flags, *args, **kwargs)
        disk.operation()
        descriptor = os_open(path, flags, *args, **kwargs)
        disk._open.add(descriptor)
        return descriptor

    def close(descriptor: int) -> None:
        disk._open.discard(descriptor)
        os_close(descriptor)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(target: Any, *args: Any, **kwargs: Any) -> Any:
            if disk.inside(target):
                disk.operation(
                    lambda: function(target, args[0][: len(args[0]) // 2], *args[1:]) if args and isinstance(args[0], bytes) else None
                )
            return function(target, *args, **kwargs)

        return operation

    patched = {name: counted(getattr(os, name)) for name in (*_BY_PATH, *_BY_FILE)}
    with (
        mock.patch.multiple(os, open=open_descriptor, close=close, **patched),
        mock.patch.object(io, "open", open_),
        mock.patch.object(builtins, "open", open_),
    ):
        yield disk


class _File:
    """A file opened for writing."""

    def __init__(self, disk: Disk, file: Any) -> None:
        self._disk, self._file = disk, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> Any:
        self._disk.operation(lambda: self._file.write(data[: len(data) // 2]))
        return self._file.write(data)
