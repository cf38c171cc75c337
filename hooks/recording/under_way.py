"""The record under way: begun, filled by the steps of the optimizers, handed to the writer, and heard of."""

import functools
from collections import OrderedDict
from collections.abc import Callable

from torch.utils.hooks import RemovableHandle

from ..observing.copies import Memory
from ..observing.matrix import Matrix
from .agreed_cadence import AgreedCadence
from .cadence import Cadence
from .journal import Journal
from .layout import Layout
from .record import Readings, Record
from .worker import Worker


class UnderWay:
    """One record at a time: in the background the next one begins when the last one is written.

    Attributes:
        record: the one being filled.
        ended: one that is filled, and may not be written yet.
        memory: of copies, in the background.
    """

    def __init__(self, layout: Layout, cadence: Cadence | AgreedCadence, journal: Journal) -> None:
        self.record: Record | None = None
        self._is_empty = True  # it, up to the first optimizer's step
        self.ended: Record | None = None
        self.memory = None if journal.worker is None else Memory()
        self._layout, self._cadence, self._journal = layout, cadence, journal
        self._spent_before = 0.0
        self._listeners: OrderedDict[int, Callable[[Record], None]] = OrderedDict()

    def listen(self, listener: Callable[[Record], None]) -> RemovableHandle:
        """Let a listener hear of every record; the handle ends it."""
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = listener
        return handle

    def may_begin(self, step: int) -> bool:
        """Whether one that is due can be made now."""
        self.hear(step)
        if self.ended is not None:  # a worker that only flushes leaves the record its turn
            self._journal.missed += self._cadence.missed(step)
            return False
        return self._cadence.affords(step, *self._journal.spent_and_elapsed(), self._journal.flush_cost)

    def is_next(self, step: int) -> bool:
        """Whether one that is due at the next step will be made."""
        return self.record is not None or self._cadence.expects(step, *self._journal.spent_and_elapsed(), self._journal.flush_cost)

    def begin(self, step: int, waits_for: set[str]) -> None:
        """Begin one that the optimizers of these labels are to fill."""
        self.record, self._is_empty = Record(step, self._layout, waits_for, self._journal.schedules), True
        self._spent_before, _ = self._journal.spent_and_elapsed()

    def add(self, label: str, part: Readings, step: int) -> None:
        """Measure what one optimizer's step gives to it; the last one completes it."""
        if self.record is None:
            return
        self._is_empty = False
        self._take(label, part, self.record)
        self.record.waits_for.discard(label)
        if not self.record.waits_for:
            self.end(step)

    def _take(self, label: str, part: Readings, record: Record) -> None:
        self._do(part.measure, record)

    def _completing(self) -> Callable[[Record, Journal], None]:
        """What is done with a record that is filled."""
        return write

    def end(self, step: int) -> None:
        """Hand it to the writer; what an optimizer that did not step would have filled stays missing. Where none did, there is no record."""
        if self.record is None or self._is_empty:
            self.record = None
            return
        self._journal.log_own_time(step)
        self._cadence.begun(self.record.step)
        self._do(self._completing(), self.record)
        # Last: where an exception of a signal handler cuts this off, the record is handed over again; rows that are given twice are merged.
        self.ended, self.record = self.record, None
        if self._journal.worker is None:
            self.hear(step)

    @property
    def is_written(self) -> bool:
        """Whether there is one that has ended, is written, and has not been heard of."""
        worker = self._journal.worker
        return self.ended is not None and not (worker is not None and worker.busy)

    def hear(self, step: int) -> None:
        """If it is written, know what it took and tell of it."""
        record = self.ended
        if record is None or not self.is_written:
            return
        self.ended = None
        spent, elapsed = self._journal.spent_and_elapsed()
        self._cadence.recorded(max(record.step, step), spent - self._spent_before, spent, elapsed, self._journal.flush_cost)
        for listener in list(self._listeners.values()):
            with self._journal.guard(step), self._journal.asked_for():
                listener(record)

    def is_elsewhere(self, matrix: Matrix) -> bool:
        """Whether nothing of a matrix is to be read here, another rank measuring it."""
        return False

    def close(self, step: int) -> None:
        """There will be no further step: end what is under way."""
        self.end(step)

    def _do(self, action: Callable[[Record, Journal], None], record: Record) -> None:
        """Work on the record, which fails on its own: at once, or by the worker in its turn."""
        if self._journal.worker is None:
            action(record, self._journal)
        else:
            self._journal.worker.submit(functools.partial(_in_background, action, record, self._journal))

    # In the background.

    def wait(self, step: int) -> None:
        """Wait until all that was recorded is written; then the writer is the caller's until the next record."""
        if self._journal.worker is not None:
            with self._journal.asked_for():
                self._journal.worker.wait()
            self._journal.take_notes()
            self.hear(step)

    def end_worker(self, worker: Worker, step: int) -> None:
        """From here on everything is done at once."""
        worker.stop()
        self.hear(step)
        self.memory = self._journal.worker = None
        if worker.error is not None:  # with `raise_errors`
            raise worker.error


def write(record: Record, journal: Journal) -> None:
    """Hand a filled record to the writer."""
    journal.append(record.rows, record.step)


def _in_background(action: Callable[[Record, Journal], None], record: Record, journal: Journal) -> None:
    """What the worker does with a record: on its own clock, with what the training thread has noted before."""
    with journal.guard(record.step):
        journal.take_notes()
        action(record, journal)
