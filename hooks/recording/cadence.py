"""When to record: every N steps, or as often as a share of the training time allows."""

import sys
from itertools import pairwise
from math import ceil, inf
from statistics import median
from typing import NamedTuple

# A record waits this many steps for an optimizer that steps less often than the others, and never past the next record.
PATIENCE = 10
# The share is kept over any so many steps in a row, and over the run.
WINDOW = 1000
# At most so many steps pass until the pace is looked at again.
LOOK = 20
# So many steps apart, at least, are the moments that are remembered of the last 1,000.
GRAIN = 10
# Commits are so far apart.
FLUSH_SECONDS = 30.0


class Look(NamedTuple):
    """Seconds of recording, and since it began, as a step begins."""

    step: int
    spent: float
    elapsed: float


class Cadence:
    """Decides the step of the next record.

    With `every` set, records fall on its multiples. Otherwise all that recording takes is kept under `overhead` times the time elapsed, over the
    run and over any 1,000 steps of it. The first record is made unpaid, for its cost to be known; each later one waits until

    - the run so far pays for what was spent, for one more record and for two commits, one that follows it and the closing one;
    - so do, at the pace that is to be expected, all windows of 1,000 steps that it would lie in;
    - as many records as 1,000 steps pay for, at equal distances, have their distance: time saved up in a pause is not spent at once.

    A record is expected to take as long as the longer of the last two, and steps as long as in the middle of the last 1,000, or in the last few
    where those were faster. What a record takes beyond that, or steps that become faster, cannot be foreseen: it is paid for afterwards. Where 1,000
    steps do not pay for a record and its commits (at 1 %, one that takes ten steps), as many as it takes do, and only the run keeps the share.
    """

    def __init__(self, every: int | None, overhead: float) -> None:
        """Of options that were checked."""
        self.every = every
        self._overhead = overhead
        self._costs: list[float] = []  # seconds of the last two records
        self._in_records = 0.0  # seconds of all
        self._last = self._first = 0  # steps of the last record, and before recording began
        self._looks: list[Look] = []  # of the last 1,000 steps
        self.due = self.expected = 0
        self.patience = PATIENCE if every is None else min(PATIENCE, every - 1)

    def start(self, step: int) -> None:
        """Set the first due step, `step` steps having been taken before."""
        self._first = step
        self._looks = [Look(step + 1, 0.0, 0.0)]
        self.due = self.expected = step + 1 if self.every is None else self._next_multiple(step)

    def begun(self, step: int) -> None:
        """Set the next due step while the record of `step` is being measured: with `every` its next multiple, else none before its cost is known."""
        self.due = self.expected = self._next_multiple(step) if self.every is not None else sys.maxsize

    def recorded(self, step: int, cost: float, spent: float, elapsed: float, commit: float = 0.0) -> None:
        """Set the next due step after a record, where that was waiting for its cost.

        Args:
            step: the step just taken.
            cost: seconds this record took.
            spent: seconds of recording, this record included.
            elapsed: seconds since the recorder was attached, `spent` included.
            commit: seconds of the last commit; 0 where there was none, and one like a record is to be expected.
        """
        if self.every is not None:
            return
        self._look(Look(step, spent - cost, elapsed - cost))
        self._costs = [*self._costs[-1:], cost]
        self._in_records += cost
        self._last = step
        self._set_due(Look(step, spent, elapsed), commit, least=1)

    def missed(self, step: int) -> bool:
        """Whether a record that is due and cannot be made is left out, with `every`; else it is made as soon as it can be."""
        if self.every is not None:
            self.due = self.expected = self._next_multiple(step)
        return self.every is not None

    def may_fall_within(self, first: int, last: int) -> bool:
        """Whether a step of this range could become due."""
        return self.every is None or self._next_multiple(first - 1) <= last

    def affords(self, step: int, spent: float, elapsed: float, commit: float = 0.0) -> bool:
        """Whether a record at `step`, which is due, is paid for; where it is not, a later step becomes due."""
        if self.every is not None or not self._costs:
            return True
        now = Look(step, spent, elapsed)
        self._look(now)
        self._set_due(now, commit, least=0)
        return self.due <= step

    def expects(self, step: int, spent: float, elapsed: float, commit: float = 0.0) -> bool:
        """Whether after `step` a record at the next one, which is due, is to be expected; where it is not, a later step becomes due."""
        if self.every is not None or not self._costs:
            return True
        self._set_due(Look(step, spent, elapsed), commit, least=1)
        return self.expected == step + 1

    def _look(self, now: Look) -> None:
        """Keep it, if the last one is some steps ago: none of the first few steps, which are slower than the others, stands for many."""
        if now.step - self._looks[-1].step >= min(GRAIN, ceil((now.step - self._first) / 4)):
            self._looks = [look for look in self._looks if look.step > now.step - WINDOW]
            self._looks.append(now)

    def _set_due(self, now: Look, commit: float, least: int) -> None:
        wait = max(least, self._wait(now, commit))
        self.expected = now.step + (WINDOW if wait == inf else int(wait))
        # Not later than after as many steps as were taken: by then the pace is known better.
        self.due = min(self.expected, now.step + min(LOOK, max(now.step - self._first, 1)))

    def _wait(self, now: Look, commit: float) -> float:
        """Steps until the next record, as it can be foreseen; 0 where it can be made now."""
        cost, share = max(self._costs), self._overhead
        need = cost + 2 * (commit or cost)  # one that follows the record, and the closing one
        pace = self._pace(now)
        # Of every step, spent otherwise: `log`, commits.
        other = max((now.spent - self._in_records) / max(now.step - self._first, 1), commit / FLUSH_SECONDS * pace)
        earned = share * pace - other
        owed = now.spent + need - share * now.elapsed
        if earned <= 0:
            return inf if owed > 0 else LOOK
        paid_for = (WINDOW - GRAIN) * earned - (need - cost)  # in so many steps, for records
        distance = ceil(need / earned) if paid_for < cost else ceil(WINDOW / int(paid_for / max(cost, 1e-9)))
        wait = max(0, self._last + distance - now.step, ceil(owed / earned))
        if wait or paid_for < cost:
            return wait
        for look in self._looks:
            # Windows that begin up to the next look have that many steps less in them.
            ahead = max(look.step + WINDOW - GRAIN - now.step, 0)
            if look.step > now.step - WINDOW and now.spent - look.spent + need + ahead * other > share * (
                now.elapsed - look.elapsed + ahead * pace
            ):
                return GRAIN
        return 0

    def _pace(self, now: Look) -> float:
        """Seconds of a step, recording aside."""
        looks = self._looks if self._looks[-1].step == now.step else [*self._looks, now]
        paces = [max(b.elapsed - b.spent - a.elapsed + a.spent, 1e-9) / (b.step - a.step) for a, b in pairwise(looks) if b.step > a.step]
        return min(median(paces), paces[-1]) if paces else 1e-9

    def _next_multiple(self, step: int) -> int:
        assert self.every is not None
        return step + self.every - step % self.every
