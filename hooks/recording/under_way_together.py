"""The record under way where several ranks make it: all begin it, or none; each measures its part when the last optimizer has stepped."""

import functools
from collections.abc import Callable
from contextlib import suppress

from ..observing.copies import Memory
from ..observing.matrix import Matrix
from ..ranks.ranks import Apart, Ranks
from .agreed_cadence import AgreedCadence
from .cadence import Cadence
from .journal import Journal
from .layout import Layout
from .making_together import make_together
from .record import Readings, Record
from .under_way import UnderWay, write


def under_way(layout: Layout, cadence: Cadence | AgreedCadence, journal: Journal, ranks: Ranks | None) -> UnderWay:
    """That of one process, or of one of several ranks."""
    if ranks is None or not isinstance(cadence, AgreedCadence):
        return UnderWay(layout, cadence, journal)
    return UnderWayTogether(layout, cadence, journal, ranks)


class UnderWayTogether(UnderWay):
    """As :class:`UnderWay`, of one rank's part."""

    def __init__(self, layout: Layout, cadence: AgreedCadence, journal: Journal, ranks: Ranks) -> None:
        super().__init__(layout, cadence, journal)
        self.memory = Memory()  # what is read waits for all optimizers, in the training thread too
        self._ranks, self._agreed = ranks, cadence
        self._readings: dict[str, Readings] = {}  # by optimizer

    def may_begin(self, step: int) -> bool:
        """Whether all begin one that is due; all are asked."""
        self.hear(step)
        if self._ranks.over is not None:
            return False
        busy = self.ended is not None
        later = not busy and not self._agreed.affords(step, *self._journal.spent_and_elapsed(), self._journal.flush_cost)
        with suppress(Apart):
            agreement = self._ranks.ask(step, busy=busy, due=self._agreed.proposed(step), later=later)
            self._agreed.agree(agreement.due, begins=agreement.begins)
            if not agreement.begins:
                self._journal.missed += self._agreed.missed(step)
            return agreement.begins
        return False

    def begin(self, step: int, waits_for: set[str]) -> None:
        """Begin this rank's part."""
        super().begin(step, waits_for)
        self._readings = {}
        self._is_empty = False  # the others wait for this rank, whatever it has to tell

    def is_elsewhere(self, matrix: Matrix) -> bool:
        """Whether another rank is known to measure a matrix that is whole here."""
        return self._ranks.is_elsewhere(matrix)

    def _take(self, label: str, part: Readings, record: Record) -> None:
        self._readings[label] = part

    def _completing(self) -> Callable[[Record, Journal], None]:
        return functools.partial(_make_together, self._ranks, self._readings)

    def close(self, step: int) -> None:
        """There will be no further step: nobody is waited for, so what is under way is no record."""
        self.record = None


def _make_together(ranks: Ranks, readings: dict[str, Readings], record: Record, journal: Journal) -> None:
    with suppress(Apart):
        try:
            is_whole = make_together(ranks, readings, record, journal)
        except Apart:
            raise
        except BaseException as error:  # of a signal handler, too: what the others wait for next is not what this rank would say next
            ranks.fail(error)
            raise
        if is_whole:
            write(record, journal)
