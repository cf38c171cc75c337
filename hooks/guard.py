"""Keeping exceptions out of a training: the one place where all that is attached to it does so."""

import functools
import signal
from collections.abc import Callable
from types import CodeType, TracebackType
from typing import Any


class KeptOut:
    """A context manager that gives an exception of its block to `tell`, and lets the training go on.

    Not kept are those that a signal handler of the training raised, which are the training's own, and, with `raising`, none. What is no
    `Exception` (an interrupt, the interpreter's end) is never kept.
    """

    # A class and no generator: an interrupt that comes as the block is left finds no frame of a generator to be raised in.

    def __init__(self, tell: Callable[[Exception], object] = lambda error: None, *, raising: bool = False) -> None:
        self._tell, self._raising = tell, raising

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception) or self._raising or raised_by_signal_handler(error):
            return False
        self._tell(error)
        return True


def raised_by_signal_handler(error: BaseException) -> bool:
    """Whether a signal handler of the training raised it, and the recorder was only what it interrupted: then it is not the recorder's to keep.

    Launchers and time limits do so, with exceptions of any class.
    """
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _code(handler: Any) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    if isinstance(handler, signal.Handlers):  # the default and no action: members of an enumeration, whose class can be called
        return None
    # A function or a method has one, an object that can be called has it at its class.
    return getattr(handler, "__code__", None) or getattr(getattr(type(handler), "__call__", None), "__code__", None)  # noqa: B004
