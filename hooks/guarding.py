"""Keeping what fails in a recorder's method out of the training, and what is the training's own from being kept."""

import functools
import os
import signal
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from .lifetime import still_open

if TYPE_CHECKING:
    from .recorder import Recorder

P = ParamSpec("P")
T = TypeVar("T")


def guarded(method: "Callable[Concatenate[Recorder, P], T]") -> "Callable[Concatenate[Recorder, P], T | None]":
    """Keep every exception of a method out of the training; it then returns None. In a forked child it does nothing."""

    @functools.wraps(method)
    def kept_out(self: "Recorder", /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        result = None
        # A forked child (a data loader's worker) shares the files but not the right to write them, and has no second thread.
        if os.getpid() != self._process:
            return result
        # Optimizers may step in threads of their own.
        with self._lock, self._journal.guard(self.step):
            result = method(self, *args, **kwargs)
        if self._journal.taken_over:
            self._detach()
            still_open.discard(self)
        return result

    return kept_out


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
