"""Recorders that are still open, and their end with the interpreter's."""

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recorder import Recorder

log = logging.getLogger("optiscope")

still_open: "set[Recorder]" = set()


def writing_to(store: Path) -> "list[Recorder]":
    """The open recorders of this process that write to `store`."""
    return [recorder for recorder in still_open if recorder.store == store.resolve()]


def _close_all() -> None:
    for recorder in list(still_open):
        # One that fails (it may have been told to raise) keeps neither the others from closing nor the interpreter from ending.
        try:
            recorder.close(compact=False)
        except Exception:
            log.exception("optiscope: %s could not be closed", recorder.store)


# Not by `atexit`: that runs when threads can no longer be started, and Zarr writes through them. concurrent.futures, which
# it uses for that, registers its own end the same way.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
