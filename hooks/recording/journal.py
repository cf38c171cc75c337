"""What becomes of a recorder's records, scalars and troubles: they are kept, written from time to time, or counted."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from ...diagnostics.store.writer import Row, TakenOver
from ..guard import KeptOut, raised_by_signal_handler
from ..ranks.no_store import RunWriter
from .cadence import FLUSH_SECONDS
from .guarded_work import GuardedWork
from .scalars import ScalarRow
from .stopwatch import Stopwatch
from .worker import Worker

log = logging.getLogger("optiscope")

# Chunks that are not full are written every `FLUSH_SECONDS`, and no more often than takes this share of the time: a kill loses at most that much.
FLUSH_SHARE = 0.001
# Steps whose scalars wait for a worker: the oldest beyond these are lost, as when a store cannot be written. A kilobyte each, or little more.
MAX_LOGGED = 16384
Logged: TypeAlias = tuple[int, dict[str, float], Mapping[str, float]]  # step, the recorder's own scalars, the user's
_COUNTERS = ("errors", "dropped", "missed")  # attributes here, and of the run, where they add up


class Journal:
    """Takes records and scalars, and flushes them; no exception of the recorder gets past :meth:`guard`.

    The writer, and the attributes that it commits, belong to one thread at a time: to the worker while that is busy, else to the training
    thread. What the training thread has to say meanwhile are notes; whoever writes next takes them first.

    Attributes:
        worker: None where everything is done at once.
        flush_cost: seconds of CPU that the last flush took.
        clock: time that the training thread spent under the guard.
        worker_clock: time that the worker did.
        errors: how many measurements failed.
        missed: records that were due while the one before was still being measured.
        raise_errors: failures are raised instead.
        taken_over: another recorder now writes to the run, and this one is to end.
    """

    def __init__(self, writer: RunWriter, step: int, raise_errors: bool, worker: Worker | None = None) -> None:
        self.worker = worker
        # The CPU time of the process is that of both threads, and of the training.
        self.clock = Stopwatch(None if worker is None else time.thread_time)
        self.worker_clock = Stopwatch(time.thread_time)
        self.errors = self.missed = 0
        self._counted_before = {name: writer.attributes[""].get(name, 0) for name in _COUNTERS}
        self._errors_elsewhere: dict[int, int] = {}  # as other ranks have counted
        self._write_failures = 0
        self._lost: set[int] = set()  # steps of records that were dropped
        self._lost_logs: set[int] = set()  # steps whose scalars were, a worker being busy
        self._given_up: set[int] = set()  # steps of records that could not be written at the end; a later call may still write them
        self._is_first = True  # the next record
        self._told = 0  # of how many lost steps it has been told at an end
        self.raise_errors = raise_errors
        self.taken_over = False
        self._writer = writer
        self._scalars = ScalarRow(writer, step)
        self._notes: deque[Callable[[], None]] = deque()
        self._logged: deque[Logged] = deque()
        self.flush_cost = 0.0
        self._begun = self._flushed = time.perf_counter()
        self._asked_for = 0.0

    @property
    def dropped(self) -> int:
        """Steps of which a record was lost, the store having stayed unwritable, or logged numbers, the worker having been busy."""
        return len(self._lost | self._lost_logs | self._given_up)

    def guard(self, step: int) -> GuardedWork:
        """Keep every exception of a block out of the training, and its work under no_grad and on the recorder's own clock."""
        return GuardedWork(self.clock_here(), partial(self.failed, step=step))

    def clock_here(self) -> Stopwatch:
        """The clock of the thread that asks."""
        return self.worker_clock if self.worker is not None and self.worker.is_current() else self.clock

    def note(self, action: Callable[[], None]) -> None:
        """Do something to the writer or its attributes: now, or in the background when it is the turn of whoever writes next."""
        if self.worker is None:
            action()
        else:
            self._notes.append(action)

    def take_notes(self) -> None:
        """Do what was noted, and take what was logged. Only for the thread whose turn it is."""
        while self._notes:
            self._notes.popleft()()
        while self._logged:
            row = self._logged[0]
            try:
                self._set(*row)
            except Exception as error:
                if not raised_by_signal_handler(error):
                    self._forget(row)
                raise
            self._forget(row)  # only now: what an exception of a signal handler cuts off is set again by whoever writes next

    def _forget(self, row: Logged) -> None:
        with suppress(ValueError):  # the training thread drops what is too old
            self._logged.remove(row)

    @property
    def attributes(self) -> dict[str, Any]:
        """The run's attributes; the next commit writes them."""
        return self._writer.attributes[""]

    @property
    def entry(self) -> dict[str, Any]:
        """What the run says of this recording: its last continuation, if it was continued."""
        found: dict[str, Any] = next(iter(self.attributes.get("continued", [])[-1:]), self.attributes)
        return found

    @property
    def optimizers(self) -> list[dict[str, Any]]:
        """Descriptions of the optimizers of this recording."""
        found: list[dict[str, Any]] = self.entry["optimizers"]
        return found

    def describe(self, optimizer: dict[str, Any]) -> None:
        """Put a description among those of the optimizers, or in the place of what was said of it."""
        entry = next((entry for entry in self.optimizers if entry["label"] == optimizer["label"]), None)
        if entry is None:
            self.optimizers.append(optimizer)
        else:
            entry.update({key: optimizer[key] for key in ("read_by", "spectrum_of", "watched") if key in optimizer})

    @property
    def schedules(self) -> list[dict[str, Any]]:
        """The run's list of the Newton–Schulz schedules that were in force."""
        found: list[dict[str, Any]] = self._writer.attributes.get("geometry", {}).get("ns_schedules", [])
        return found

    @contextmanager
    def asked_for(self) -> Iterator[None]:
        """Time of the block is what the user asked for at a cadence of their own: on the clock, but not what records are spaced by."""
        before = self.clock.wall
        try:
            yield
        finally:
            self._asked_for += self.clock.wall - before

    def spent_and_elapsed(self) -> tuple[float, float]:
        """Seconds of recording, and since it began, both without what was asked for."""
        spent = self.clock.wall + self.worker_clock.finished_cpu - self._asked_for
        return spent, time.perf_counter() - self._begun - self._asked_for

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take scalars of a step; those that are no numbers fail one by one."""
        numbers = {}
        for name, value in values.items():
            with self.guard(step):
                numbers[name] = float(value.detach() if isinstance(value, Tensor) else value)
        self._log(step, numbers)

    def log_own_time(self, step: int) -> None:
        """Set the scalars of what recording costs."""
        self._log(step, {})

    def _log(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.worker is None:
            self._set(step, self._own_time(), numbers)
        else:
            self._logged.append((step, self._own_time(), numbers))

    def _own_time(self) -> dict[str, float]:
        own = {"overhead_seconds": self.clock.wall, "overhead_cpu_seconds": self.cpu, "elapsed_seconds": time.perf_counter() - self._begun}
        if spent := self.worker_clock.finished_cpu:
            own["background_cpu_seconds"] = spent
        return own

    def _set(self, step: int, own: dict[str, float], numbers: Mapping[str, float]) -> None:
        with self.guard(step):
            self._scalars.begin(step)
            self._scalars.set_own(**own)
        for name, number in numbers.items():
            with self.guard(step):
                self._scalars.set(name, number)

    @property
    def cpu(self) -> float:
        """Seconds of CPU of both threads."""
        return self.clock.cpu + self.worker_clock.finished_cpu

    def append(self, rows: Mapping[str, Row], step: int) -> None:
        """Take the rows of a record by group; flush if it is the first, for whoever looks at the run, if it ends a chunk, or the last flush is some time ago."""
        full = [self._writer.append(group, step, row) for group, row in rows.items()]
        is_first, self._is_first = self._is_first, False
        if is_first or any(full) or self.flush_is_due:
            self.flush()

    def end(self, compact: bool) -> None:
        """Flush, the scalars of the present step included, and let another recorder write.

        With `compact`, a run of many records is laid out for reading first.
        """
        # Else an interrupt: it is still the worker's turn, and the interpreter's end ends this.
        if self.worker is None or not self.worker.busy:
            try:
                self._end(compact)
            finally:
                self._writer.release()

    def _end(self, compact: bool) -> None:
        self.take_notes()
        if self._scalars.is_begun:
            self._scalars.set_own(**self._own_time())
        self._scalars.hand_over()
        self._write(self._writer.close)
        self._tell_what_is_lost()
        if compact and not self.taken_over and not self._writer.unwritten:
            self._compact()

    def _tell_what_is_lost(self) -> None:
        self._given_up = self._writer.unwritten
        lost = self._lost | (set() if self.taken_over else self._given_up)
        if len(lost | self._lost_logs) <= self._told:
            return
        self._told = len(lost | self._lost_logs)
        if lost:
            log.warning(
                "optiscope: %d records, of steps %d to %d, could not be written to %s and are lost.",
                len(lost), min(lost), max(lost), self._writer.path.resolve(),
            )  # fmt: skip
        if logs := self._lost_logs:
            log.warning("optiscope: what was logged at %d steps, of steps %d to %d, is lost.", len(logs), min(logs), max(logs))

    @property
    def flush_is_due(self) -> bool:
        """Whether the last flush is some time ago."""
        return time.perf_counter() - self._flushed > max(FLUSH_SECONDS, self.flush_cost / FLUSH_SHARE)

    def flush_if_due(self, step: int, may_submit: bool) -> None:
        """Flush if the last one is some time ago: at once, or in the background, where the training thread never waits for it, if it `may_submit`."""
        if self.worker is None:
            if self.flush_is_due:
                self.flush()
        elif may_submit and not self.worker.busy and (self.flush_is_due or len(self._logged) > MAX_LOGGED // 16):
            self.worker.submit(partial(self._flush_in_background, step))
        else:
            while len(self._logged) > MAX_LOGGED:
                lost, *_ = self._logged.popleft()
                if not self._lost_logs:
                    log.warning(
                        "optiscope: step %d: more than %d logged steps wait for the thread that measures and writes. Until it is done the oldest are "
                        "lost, from step %d on, and counted in `dropped` without a message. Training goes on.", step, MAX_LOGGED, lost,
                    )  # fmt: skip
                self._lost_logs.add(lost)

    def _flush_in_background(self, step: int) -> None:
        with self.guard(step):
            self.take_notes()
            if self.flush_is_due:
                self.flush()

    def flush(self) -> None:
        """Write and commit. Where that fails, the newest records are kept and tried again."""
        self._write(self._writer.flush)

    def _write(self, write: Callable[[], None]) -> None:
        if self.taken_over:
            return
        self.take_notes()
        self._flushed = time.perf_counter()  # first, so that a full disk is tried again no sooner than another flush is due
        for name, before in self._counted_before.items():
            if count := getattr(self, name):
                self.attributes[name] = before + count
        begun = time.thread_time()
        with self.writing(Exception):
            for error in self._scalars.make_arrays():
                self.failed(error, self._scalars.step)
            write()
        self.flush_cost = time.thread_time() - begun

    @contextmanager
    def writing(self, *kinds: type[Exception]) -> Iterator[None]:
        """What fails in the block is that the store cannot be written now: for these kinds of errors, and where another recorder has taken it over."""
        caught: tuple[type[Exception], ...] = (*kinds, TakenOver)
        try:
            yield
        except caught as error:
            if raised_by_signal_handler(error):
                raise
            self._cannot_write(error)

    def _compact(self) -> None:
        with KeptOut(self._cannot_compact, raising=self.raise_errors):
            self._writer.lay_out_for_reading()

    def _cannot_compact(self, error: Exception) -> None:
        log.warning(
            "optiscope: %s could not be laid out for reading (%s: %s). It is whole, and read more slowly.",
            self._writer.path.resolve(), type(error).__name__, error,
        )  # fmt: skip

    def failed(self, error: Exception, step: int) -> None:
        """Count a failure, and tell of the first."""
        if self.raise_errors:
            raise error
        self.errors += 1
        if self.errors == 1:
            log.warning(
                "optiscope: recording failed at step %d (%s: %s). Training goes on; what failed is missing from this record, the next one "
                "is tried as usual, further failures are counted without a message.", step, type(error).__name__, error,
            )  # fmt: skip

    def failed_elsewhere(self, rank: int, errors: int, step: int) -> None:
        """Count what has failed at another rank, which has told of it itself, since that rank counted last."""
        self.errors += errors - self._errors_elsewhere.get(rank, 0)
        self._errors_elsewhere[rank] = errors

    def _cannot_write(self, error: Exception) -> None:
        if self.raise_errors:
            raise error
        if isinstance(error, TakenOver):
            log.warning("optiscope: %s; this one has detached, and what it had not committed is lost.", error)
            self.taken_over = True
            self._writer.release()
            return
        self._write_failures += 1
        self._lost |= set(self._writer.trim())
        if self._write_failures == 1:
            log.warning(
                "optiscope: %s could not be written (%s: %s). Training goes on; the newest records are kept in memory and tried again, "
                "further failures are counted without a message.", self._writer.path.resolve(), type(error).__name__, error,
            )  # fmt: skip
