"""Recordings that are still open, and their end with the interpreter's."""

import logging
import threading
from pathlib import Path
from typing import Protocol

from ..observing.watched import Watched


class Open(Protocol):
    """A recording that is open, and can be closed."""

    store: Path
    step: int
    watched: list[Watched]

    def close(self, *, compact: bool) -> None:
        """End it."""


log = logging.getLogger("optiscope")

still_open: set[Open] = set()


def writing_to(store: Path) -> list[Open]:
    """The open recordings of this process that write to `store`."""
    return [one for one in still_open if one.store == store.resolve()]


def _close_all() -> None:
    for one in list(still_open):
        # One that fails (it may have been told to raise) keeps neither the others from closing nor the interpreter from ending.
        try:
            one.close(compact=False)
        except Exception:
            log.exception("optiscope: %s could not be closed", one.store)


# Not by `atexit`: that runs when threads can no longer be started, and Zarr writes through them. concurrent.futures, which
# it uses for that, registers its own end the same way.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
