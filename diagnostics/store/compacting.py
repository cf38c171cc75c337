"""A run laid out for reading after its end: a process that was being ended leaves that out, and a close may be interrupted."""

from pathlib import Path

from .continuing import nothing_or_a_run
from .lock import RunLock
from .writer import Writer


def compact(path: str | Path) -> int:
    """Do what is left of compacting the run at `path`, as its recorder's `close` would have; how many arrays that were.

    Raises:
        RunError: it is no run, is damaged (what was compacted before that was found stays so), or is being written.
        OSError: there is no room for the copies.
    """
    if nothing_or_a_run(Path(path)):
        return 0
    lock = RunLock(Path(path))
    try:
        return Writer(path, {}, lay_out=False).lay_out_for_reading()
    finally:
        lock.release()
