"""Keeping what fails in a recorder's method out of the training."""

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

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
        with self._journal.guard(self.step):
            result = method(self, *args, **kwargs)
        if self._journal.taken_over:
            self._detach()
        return result

    return kept_out
