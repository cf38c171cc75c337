"""Keeping what fails in a recorder's method out of the training, what is the training's own from being kept, and one call out of another."""

import functools
import os
import signal
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

if TYPE_CHECKING:
    from ..recorder import Recorder

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
        outermost = not _is_at_work(self)
        try:
            # Optimizers may step in threads of their own.
            with self._lock, self._journal.guard(self.step):
                result = method(self, *args, **kwargs)
        finally:
            if outermost:
                self._catch_up()
        return result

    return kept_out


def in_turn(method: "Callable[Concatenate[Recorder, P], object]") -> "Callable[Concatenate[Recorder, P], None]":
    """Do it when the recorder's work ends, where this very thread is within some: a signal handler that interrupted that, or a listener, has called it.

    Neither could wait for that end, and half of what the work does may be done.
    """

    @functools.wraps(method)
    def when_it_is_time(self: "Recorder", /, *args: P.args, **kwargs: P.kwargs) -> None:
        if _is_at_work(self):
            self._later.append(functools.partial(method, self, *args, **kwargs))
        else:
            method(self, *args, **kwargs)

    return when_it_is_time


def _is_at_work(recorder: "Recorder") -> bool:
    """Whether the calling thread is. The lock itself tells: a flag could be left standing by an exception of a signal handler."""
    found: bool = recorder._lock._is_owned()  # type: ignore[attr-defined]
    return found


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
