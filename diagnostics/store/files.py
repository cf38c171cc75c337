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
        self._partial = (root / f".{writer}.{number}.partial" for number in count())

    def replace(self, path: str, content: Iterable[bytes]) -> None:
        """Make `path` (below the root) a file of these pieces. Whoever looks sees all of the one before, or all of this one."""
        target, partial = self.root / path, next(self._partial)
        try:
            with partial.open("wb") as file:
                file.writelines(content)
                size = file.tell()
            try:
                os.replace(partial, target)
            except FileNotFoundError:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, target)
        except Exception:
            with suppress(OSError):
                partial.unlink()  # on a full disk its bytes are what another file needs
            raise
        self.bytes_written += size

    def replace_document(self, path: str, document: dict[str, Any]) -> None:
        """Make `path` a metadata document."""
        self.replace(f"{path}/{METADATA}" if path else METADATA, [json.dumps(document, separators=(",", ":")).encode()])

    def document(self, path: str) -> dict[str, Any]:
        """The metadata document of a node."""
        found: dict[str, Any] = json.loads((self.root / path / METADATA).read_text(encoding="utf-8"))
        return found

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
