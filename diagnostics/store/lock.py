"""Who writes to a run: one process at a time, which says who it is (docs/store.md)."""

import errno
import json
import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from .files import json_bytes, replace_file
from .run_error import RunError

LOCK, OWNER = ".lock", ".owner.json"
LOCK_FILES = frozenset({LOCK, OWNER, f"{OWNER}.partial"})

# What flock answers where a file system has none: some of those in user space, network ones without a lock server.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class RunLock:
    """The right to write to the run in a folder, until :meth:`release` or the end of this process, in whatever way it comes.

    The lock is the kernel's (flock) and no file that a killed process could leave behind. A forked child holds none: it closes its copy, which
    releases nothing, and cannot keep the lock beyond its parent's life.

    Attributes:
        former: who held it last and ended without releasing it, in words; None where the last owner did.
        unlocked: why there is no lock, where the file system has none: a second writer is not refused then. None where there is.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock of the run at `folder`, which is made where there is none.

        Raises:
            RunError: another process has it; the text says which.
            OSError: the folder cannot be written to.
        """
        self._folder = folder.resolve()  # the process may change its working folder
        self._process = os.getpid()
        self._folder.mkdir(parents=True, exist_ok=True)
        self.unlocked: str | None = None
        # No fallback to a file whose existence is the lock: a killed process would leave it for ever.
        self._lock = FileLock(self._folder / LOCK, thread_local=False, fallback_to_soft=False)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise RunError(
                f"is being written by {owner(self._folder) or 'another process'}",
                subject="store", place=folder, advice="close that recorder, or record to another path",
            ) from None  # fmt: skip
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.unlocked = os.strerror(error.errno or 0)
        self.former = None if self.unlocked else owner(self._folder)
        try:
            self._say_who()
        except BaseException:
            self._lock.release()
            raise

    def _say_who(self) -> None:
        who = {"host": platform.node(), "process": self._process, "since": datetime.now(UTC).isoformat(timespec="seconds")}
        partial = self._folder / f"{OWNER}.partial"
        partial.unlink(missing_ok=True)  # of one that was killed
        replace_file(self._folder / OWNER, [json_bytes(who)], partial)

    def release(self) -> None:
        """Give it back. Releasing twice is harmless, and so is a forked child's."""
        if os.getpid() != self._process or not (self._lock.is_locked or self.unlocked):
            return
        self.unlocked = None
        # Before the lock, while nobody else can have written it. A store that can no longer be written to leaves it: what it says is taken over.
        with suppress(OSError):
            (self._folder / OWNER).unlink(missing_ok=True)
        self._lock.release()


def owner(folder: Path) -> str | None:
    """Who says to write to the run at `folder`, in words; None where nobody does. It may have ended since without a word."""
    who = read_owner(folder)
    return None if who is None else f"process {who[0]} on {who[1]} since {who[2]}"


def read_owner(folder: Path) -> tuple[int, str, str] | None:
    """The same as process number, host and time."""
    try:
        with (folder / OWNER).open("rb") as file:
            who = json.loads(file.read(4096))
        return int(who["process"]), str(who["host"])[:100], str(who["since"])[:40]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
