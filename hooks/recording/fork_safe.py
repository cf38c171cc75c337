"""Pieces of work of a thread beside the training that no fork falls into: who forks waits for the one under way.

OpenBLAS, which NumPy calls, ends its threads before a fork. Where another thread had just given them work, neither that thread nor the fork comes
back: at every fork of a data loader's workers a training would run the risk of standing still for ever.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_work = threading.RLock()
_turn = threading.RLock()  # kept by whoever forks, so that it is its turn before the next piece


@contextmanager
def fork_safe() -> Iterator[None]:
    """The block is such a piece."""
    with _turn:
        pass
    with _work:
        yield


def _before_fork() -> None:
    _turn.acquire()
    _work.acquire()


def _after_fork() -> None:
    _work.release()
    _turn.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
