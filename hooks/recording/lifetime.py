"""Recordings that are still open, and their end with the interpreter's."""

import atexit
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..guard import KeptOut
from ..observing.watched import Watched


class Open(Protocol):
    """A recording that is open: it can be told numbers, and closed."""

    store: Path
    step: int
    watched: list[Watched]

    def log(self, scalars: Mapping[str, Any]) -> None:
        """Record numbers at the current step."""

    def in_turn(self, action: Callable[..., object], *args: Any) -> None:
        """Do something, and keep its exceptions out of the training."""

    def close(self, *, compact: bool) -> None:
        """End it."""


log = logging.getLogger("optiscope")

still_open: set[Open] = set()

# So often, while a process ends, what a signal handler cut off is begun again. Who interrupts more often wants the end more than the records.
INTERRUPTS = 10


def writing_to(store: Path) -> list[Open]:
    """The open recordings of this process that write to `store`."""
    return [one for one in still_open if one.store == store.resolve()]


def _close_all() -> None:
    """Close every recorder. What a signal handler raises meanwhile is raised when all are closed."""
    interrupt: BaseException | None = None
    for _ in range(INTERRUPTS):
        try:
            for one in list(still_open):
                _close(one)
            break
        except BaseException as error:
            interrupt = error
    else:
        still_open.clear()
    if interrupt is not None:
        raise interrupt


def _close(one: Open) -> None:
    def tell(error: Exception) -> None:
        log.error("optiscope: %s could not be closed", one.store, exc_info=error)
        still_open.discard(one)

    # One that fails (it may have been told to raise) keeps neither the others from closing nor the interpreter from ending.
    with KeptOut(tell):
        one.close(compact=False)


# Not by `atexit` alone: that runs when threads can no longer be started, and Zarr writes through them. concurrent.futures, which
# it uses for that, registers its own end the same way. By `atexit` too: an interrupt may come before the first is called.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
atexit.register(_close_all)
