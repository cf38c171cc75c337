"""Work of the recorder's: without gradients, on a clock of its own, its exceptions kept out of the training."""

from collections.abc import Callable
from types import TracebackType

import torch
from torch._C import _set_grad_enabled

from ..guard import KeptOut
from .stopwatch import Stopwatch


class GuardedWork(KeptOut):
    """A block of it.

    No generator: one that an exception of a signal handler leaves on the way to the block, or from it, ends only when the traceback is let go of, and
    would change gradient mode then.
    """

    def __init__(self, clock: Stopwatch, failed: Callable[[Exception], object]) -> None:
        super().__init__(failed)
        self._clock = clock

    def __enter__(self) -> None:
        self._grad_enabled = torch.is_grad_enabled()
        self._clock.__enter__()
        _set_grad_enabled(False)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            return super().__exit__(kind, error, trace)
        finally:
            _set_grad_enabled(self._grad_enabled)
            self._clock.__exit__()
