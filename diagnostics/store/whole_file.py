"""A file that a user asked for: there whole or not at all, with the permissions it had, through links, to devices."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from .files import replace_file


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8 with the line breaks that it has.

    The content goes into a new file beside it, which then takes its place. It has the permissions of the one whose place it takes, or
    those that new files have. A link is followed, and what is no file, a device or a pipe, is written to as it is.

    Raises:
        OSError: it cannot be written; the text names `path`.
    """
    content = content.encode("utf-8") if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb") as device:
            device.write(content)
        return
    # A name that nobody can foresee. Short, for names have a longest length.
    partial = target.with_name(f".{token_hex(8)}.partial")
    try:
        replace_file(target, [content], partial, None if mode is None else stat.S_IMODE(mode))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            partial.unlink()  # of one that was interrupted
