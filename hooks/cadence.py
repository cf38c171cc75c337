"""When to record: every N steps, or as often as a share of the training time allows."""

import sys
from math import ceil

# A record waits this many steps for an optimizer that steps less often than the others, and never past the next record.
PATIENCE = 10


class Cadence:
    """Decides the step of the next record.

    With `every` set, records fall on its multiples. Otherwise the time spent on all records is kept under `overhead`
    times the time elapsed: the next record waits until the elapsed time pays for what was spent and for one more
    record like the last.
    """

    def __init__(self, every: int | None, overhead: float) -> None:
        """Raise ValueError for an `every` below 1 or an `overhead` outside (0, 1]."""
        if every is not None and (every < 1 or every != int(every)):
            raise ValueError(f"every: expected a number of steps of at least 1, or None to keep under `overhead`; got {every}")
        if not 0 < overhead <= 1:
            raise ValueError(f"overhead: expected a share of the training time above 0 and up to 1, got {overhead}")
        self._every = None if every is None else int(every)
        self._overhead = overhead
        self._first_step = 0
        self._cost = 0.0  # seconds of the last record
        self.due = 0
        self.patience = PATIENCE if every is None else min(PATIENCE, every - 1)

    def start(self, step: int) -> None:
        """Set the first due step, `step` steps having been taken before."""
        self._first_step = step
        self.due = step + 1 if self._every is None else self._next_multiple(step)

    def begun(self, step: int) -> None:
        """Set the next due step while the record of `step` is being measured: with `every` its next multiple, else none before its cost is known."""
        self.due = self._next_multiple(step) if self._every is not None else sys.maxsize

    def recorded(self, step: int, cost: float, spent: float, elapsed: float) -> None:
        """Set the next due step after a record, where that was waiting for its cost.

        Args:
            step: the step just taken.
            cost: seconds this record took.
            spent: seconds of all records, this one included.
            elapsed: seconds since the recorder was attached, `spent` included.
        """
        self._cost = cost
        if self._every is None:
            self.due = step + self._wait(step, spent, elapsed)

    def missed(self, step: int) -> bool:
        """Whether a record that is due and cannot be made is left out, with `every`; else it is made as soon as it can be."""
        if self._every is not None:
            self.due = self._next_multiple(step)
        return self._every is not None

    def may_fall_within(self, first: int, last: int) -> bool:
        """Whether a step of this range could become due."""
        return self._every is None or self._next_multiple(first - 1) <= last

    def affords(self, step: int, spent: float, elapsed: float) -> bool:
        """Whether a record at `step`, which is due, is paid for; where it is not, a later step becomes due.

        The due step was set from the pace of the steps before it, and steps may have become faster (the first ones compile).
        """
        if self._every is not None or self._cost == 0 or self._owed(spent, elapsed) <= 0:
            return True
        self.due = step + self._wait(step, spent, elapsed)
        return False

    def _owed(self, spent: float, elapsed: float) -> float:
        return spent + self._cost - self._overhead * elapsed

    def _wait(self, step: int, spent: float, elapsed: float) -> int:
        taken = max(step - self._first_step, 1)
        seconds_per_step = max((elapsed - spent) / taken, 1e-9)
        wait = max(1, ceil(self._owed(spent, elapsed) / (self._overhead * seconds_per_step)))
        # At most as many steps as were taken: by then the pace is known better.
        return min(wait, taken)

    def _next_multiple(self, step: int) -> int:
        assert self._every is not None
        return step + self._every - step % self._every
