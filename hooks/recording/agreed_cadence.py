"""When several ranks record: the steps at which they ask each other, which all know beforehand."""

import sys

from .cadence import LOOK, Cadence


class AgreedCadence:
    """A cadence whose due steps rank 0 names. Each rank keeps its own :class:`Cadence`, by its own clock; that of rank 0 decides.

    Attributes:
        due: the step at which the ranks ask each other whether a record begins.
        expected: the same.
        patience: as of :class:`Cadence`.
    """

    def __init__(self, own: Cadence) -> None:
        self._own = own
        self._first = self._next = 0
        self.due = self.expected = 0
        self.patience = own.patience
        self.recorded, self.missed = own.recorded, own.missed
        self.affords, self.may_fall_within = own.affords, own.may_fall_within

    def start(self, step: int) -> None:
        """Set the first due step, `step` steps having been taken before."""
        self._own.start(step)
        self._first = step
        self.agree(self._own.due, begins=False)

    def agree(self, due: int, *, begins: bool) -> None:
        """The ranks ask each other again at this step; where a record begins, they do not before it has ended."""
        self._next = due
        if not begins:
            self.due = self.expected = due

    def begun(self, step: int) -> None:
        """The record of `step` has all that it is made of."""
        self._own.begun(step)
        self.due = self.expected = self._next

    def proposed(self, step: int) -> int:
        """When to ask again after `step`: at the next multiple of `every`; else when the own cadence says, or soon where that waits for a record's cost."""
        if self._own.every is not None:
            return step + self._own.every - step % self._own.every
        return self._own.due if step < self._own.due < sys.maxsize else step + min(LOOK, max(step - self._first, 1))

    def expects(self, step: int, spent: float, elapsed: float, commit: float = 0.0) -> bool:
        """Whether a record at the step after `step` is to be expected."""
        return self.due == step + 1
