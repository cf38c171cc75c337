"""Whether a run is being written: by whom, whether that process still lives, and when it last committed. Nothing is taken or touched."""

import os
import platform
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .files import METADATA
from .lock import read_owner

# The time when a process began is known by the boot's, which a corrected clock moves.
CLOCKS = 60.0


@dataclass(frozen=True)
class Activity:
    """A run that its writer has not closed.

    Attributes:
        process, host, since: of the writer, as it says itself.
        alive: whether it still is there; None where it is of another machine.
        last_commit: seconds since the last commit; None where that cannot be seen.
    """

    process: int
    host: str
    since: str
    alive: bool | None
    last_commit: float | None

    def __str__(self) -> str:
        who = f"process {self.process} on {self.host}"
        committed = "" if self.last_commit is None else f", last commit {_ago(self.last_commit)}"
        if self.alive is False:
            return f"no longer being written: {who} ended without closing it{committed}; what is committed is kept, and attaching again goes on"
        doubt = "" if self.alive else ", another machine (whether it still runs cannot be seen from here)"
        return f"being written by {who}{doubt}{committed}"

    def as_dict(self) -> dict[str, Any]:
        """As plain values, and in words."""
        return {**vars(self), "words": str(self)}


def activity(folder: str | Path) -> Activity | None:
    """Who writes to the run at `folder`; None where nobody does, as after a recorder was closed.

    The writer's own word (`.owner.json`) says who, the process table of its machine whether it lives, the root's document when it last committed. The
    lock is left alone: who tries it holds it for a moment, in which a training would be refused.
    """
    who = read_owner(Path(folder))
    if who is None:
        return None
    process, host, since = who
    try:
        last = max(time.time() - (Path(folder) / METADATA).stat().st_mtime, 0.0)
    except OSError:
        last = None
    return Activity(process, host, since, _lives(process, since) if host == platform.node() else None, last)


def _lives(process: int, since: str) -> bool | None:
    """Whether the process that began before `since` is there; another may have its number by now, after a restart above all."""
    if process <= 0 or os.name != "posix":
        return None
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    begun = _begun(process)
    try:
        return begun is None or begun < datetime.fromisoformat(since).timestamp() + CLOCKS
    except ValueError:
        return True


def _begun(process: int) -> float | None:
    """When a process began, in seconds since the epoch; None where the system does not tell (it does on Linux)."""
    try:
        ticks = int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
        boot = next(
            int(line.split()[1]) for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines() if line.startswith("btime ")
        )
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
