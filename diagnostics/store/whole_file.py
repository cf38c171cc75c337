"""Files that are there whole or not at all: a process that is killed while it writes leaves what was there before."""

import os
import stat
from pathlib import Path
from secrets import token_hex


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
    # A name that nobody can foresee, and "x": no link that somebody has laid there is followed. Short, for names have a longest length.
    partial = target.with_name(f".{token_hex(8)}.partial")
    try:
        try:
            with open(partial, "xb") as file:
                file.write(content)
            if mode is not None:
                os.chmod(partial, stat.S_IMODE(mode))
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
