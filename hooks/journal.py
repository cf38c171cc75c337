"""What becomes of a recorder's records, scalars and troubles: they are kept, written from time to time, or counted."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .cadence import Stopwatch
from .scalars import ScalarRow
from .writer import Row, TakenOver, Writer

log = logging.getLogger("optiscope")

FLUSH_SECONDS = 30.0


class Journal:
    """Takes records and scalars, and flushes them; no exception of the recorder gets past :meth:`guard`.

    Attributes:
        clock: time spent under the guard.
        errors: how many measurements failed.
        dropped: records lost because the store could not be written for long.
        raise_errors: failures are raised instead.
        taken_over: another recorder now writes to the run, and this one is to end.
    """

    def __init__(self, writer: Writer, step: int, raise_errors: bool) -> None:
        self.clock = Stopwatch()
        self.errors = 0
        self.dropped = 0
        self._write_failures = 0
        self.raise_errors = raise_errors
        self.taken_over = False
        self._writer = writer
        self._scalars = ScalarRow(writer, step)
        self._begun = self._flushed = time.perf_counter()
        self._asked_for = 0.0

    @contextmanager
    def guard(self, step: int) -> Iterator[None]:
        """Keep every exception of the block out of the training, and its work under no_grad and on the recorder's own clock."""
        with self.clock, torch.no_grad():
            try:
                yield
            except Exception as error:
                self.failed(error, step)

    @property
    def attributes(self) -> dict[str, Any]:
        """The run's attributes; the next commit writes them."""
        return self._writer.attributes[""]

    @property
    def optimizers(self) -> list[dict[str, Any]]:
        """Descriptions of the optimizers of this recording: those of the run's last continuation, if it was continued."""
        of: dict[str, Any] = next(iter(self.attributes.get("continued", [])[-1:]), self.attributes)
        found: list[dict[str, Any]] = of["optimizers"]
        return found

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
        return self.clock.wall - self._asked_for, time.perf_counter() - self._begun - self._asked_for

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take scalars of a step; those that are no numbers fail one by one."""
        self.log_own_time(step)
        for name, value in values.items():
            with self.guard(step):
                self._scalars.set(name, float(value.detach() if isinstance(value, Tensor) else value))

    def log_own_time(self, step: int) -> None:
        """Set the scalars of what recording costs."""
        with self.guard(step):
            self._scalars.begin(step)
            elapsed = time.perf_counter() - self._begun
            self._scalars.set_own(overhead_seconds=self.clock.wall, overhead_cpu_seconds=self.clock.cpu, elapsed_seconds=elapsed)

    def append(self, rows: Mapping[str, Row], record_step: int, step: int) -> None:
        """Take the rows of a record by group, `step` steps having been taken; flush if that ends a chunk."""
        full = [self._writer.append(group, record_step, row) for group, row in rows.items()]
        self.log_own_time(step)
        if any(full):
            self.flush()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Behind the block, whatever becomes of it: flush, the scalars of the present step included, and let another recorder write."""
        try:
            try:
                yield
            finally:
                self._scalars.hand_over()
                self.flush()
        finally:
            self._writer.release()

    def flush_if_due(self) -> None:
        """Flush if the last one is some time ago."""
        if time.perf_counter() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write and commit. Where that fails, the newest records are kept and tried again."""
        if self.taken_over:
            return
        self._flushed = time.perf_counter()  # first, so that a full disk is tried again no sooner than another flush is due
        try:
            self._writer.flush()
        except Exception as error:
            self._cannot_write(error)

    def failed(self, error: Exception, step: int) -> None:
        """Count a failure, and tell of the first."""
        if self.raise_errors:
            raise error
        self.errors += 1
        self._count("errors")
        if self.errors == 1:
            log.warning(
                "optiscope: recording failed at step %d (%s: %s). Training goes on; what failed is missing from this record, the next one "
                "is tried as usual, further failures are counted without a message.", step, type(error).__name__, error,
            )  # fmt: skip

    def _cannot_write(self, error: Exception) -> None:
        if self.raise_errors:
            raise error
        if isinstance(error, TakenOver):
            log.warning("optiscope: %s; this one has detached, and what it had not committed is lost.", error)
            self.taken_over = True
            self._writer.release()
            return
        self._write_failures += 1
        dropped = self._writer.trim()
        self.dropped += dropped
        self._count("dropped", dropped)
        if self._write_failures == 1:
            log.warning(
                "optiscope: %s could not be written (%s: %s). Training goes on; the newest records are kept in memory and tried again, "
                "further failures are counted without a message.", self._writer.path.resolve(), type(error).__name__, error,
            )  # fmt: skip

    def _count(self, attribute: str, more: int = 1) -> None:
        """Add to a counter among the run's attributes."""
        self.attributes[attribute] = self.attributes.get(attribute, 0) + more
