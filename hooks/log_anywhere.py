"""`log`: numbers of your own into whatever is being recorded, from any place in a training's code."""

from collections.abc import Callable, Mapping
from typing import Any

from .recording.lifetime import still_open

# Under `diag run` what keeps numbers until its first recorder is there; nobody else waits for one.
_keeping: list[Callable[[Mapping[str, Any]], object]] = []


def log(**scalars: Any) -> None:
    """Record numbers of your own (loss, accuracy, …) with every recorder that is open in this process; without one, do nothing.

    For code that holds no recorder: a training step far from `attach`, or a script under `diag run`. Each open recorder takes the numbers as by its own
    :meth:`Recorder.log`, at its own current step, and by the same rules: what is no number is counted and told of, and raises nothing into the
    training. A forked child logs nothing.

    Under `diag run` the numbers logged before the first step are kept, of each name the last one, and recorded as of before that step. Between two trainings of a
    script the former recorder takes them until the next training's first step.

    Example:
        >>> log(loss=0.5)  # no recorder is open: nothing happens
    """
    for one in list(still_open):
        one.in_turn(one.log, scalars)
    for keep in _keeping:
        keep(scalars)


def keep_with(keep: Callable[[Mapping[str, Any]], object]) -> None:
    """From now on give what is logged to `keep` too, until :func:`keep_no_more`: a recorder is going to be there."""
    _keeping.append(keep)


def keep_no_more() -> None:
    """The recorder is there, or will not come."""
    _keeping.clear()
