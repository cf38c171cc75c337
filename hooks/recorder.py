"""Attaching to optimizers: the recorder that watches their steps and writes what it measures."""

import functools
import logging
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..diagnostics.observation import Measured, NewtonSchulz, Observation, measure_geometry, measure_update
from .cadence import Cadence, Stopwatch
from .layout import empty_rows
from .lifetime import still_open
from .matrices import Matrix
from .scalars import ScalarRow
from .snapshot import Snapshot
from .watched import Watched
from .writer import TakenOver, Writer

log = logging.getLogger("optiscope")

FLUSH_SECONDS = 30.0

P = ParamSpec("P")
T = TypeVar("T")


def _guarded(method: "Callable[Concatenate[Recorder, P], T]") -> "Callable[Concatenate[Recorder, P], T | None]":
    """Keep every exception of the recorder out of the training, and its work under no_grad and on its own clock."""

    @functools.wraps(method)
    def guarded(self: "Recorder", /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        with self._clock, torch.no_grad():
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                self._failed(error)
                return None

    return guarded


class Recorder:
    """Watches optimizers and writes a run; made by :func:`attach`.

    Attributes:
        step: optimizer steps taken.
        errors: how many measurements failed.
        dropped: records lost because the store could not be written for long.
        store: where the run is.
    """

    def __init__(
        self,
        watched: list[Watched],
        rows: dict[str, list[Matrix]],
        writer: Writer,
        cadence: Cadence,
        first_step: int,
        *,
        raise_errors: bool,
    ) -> None:
        self.step = first_step
        self.errors = 0
        self.dropped = 0
        self.store = writer.path.resolve()
        self._write_failures = 0
        self._raise_errors = raise_errors
        self._watched = watched
        self._row_of = {group: {matrix: i for i, matrix in enumerate(matrices)} for group, matrices in rows.items()}
        self._writer = writer
        self._cadence = cadence
        self._clock = Stopwatch()
        self._begun = self._flushed = time.perf_counter()
        self._process = os.getpid()

        self._record: dict[str, dict[str, NDArray[Any]]] = {}  # the record being filled, by group; empty when none is
        self._record_step = first_step
        self._record_waits_for: set[str] = set()
        self._spent_before = 0.0
        self._scalars = ScalarRow(writer, first_step)

        self._handles = [
            handle
            for w in watched
            for handle in (
                w.optimizer.register_step_pre_hook(functools.partial(self._before_step, w)),
                w.optimizer.register_step_post_hook(functools.partial(self._after_step, w)),
            )
        ]
        still_open.add(self)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def overhead_seconds(self) -> float:
        """Wall time that recording has taken."""
        return self._clock.wall

    @property
    def overhead_cpu_seconds(self) -> float:
        """CPU time that recording has taken, of all threads."""
        return self._clock.cpu

    @_guarded
    def log(self, /, **scalars: Any) -> None:
        """Record numbers of your own (loss, accuracy, …) at the current step; several calls at one step are merged.

        A tensor is read with `float()`, which waits for an accelerator: log only as often as you would print. A slash in
        a name, which in the store would mean a group, becomes a dot. After `close` they are written at once.
        """
        self._log_own_time()
        for name, value in scalars.items():
            self._log(name, value)
        if self._handles:
            self._flush_if_due()
        else:
            self._finish()

    @_guarded
    def _log(self, name: str, value: Any) -> None:
        self._scalars.set(name, float(value.detach() if isinstance(value, Tensor) else value))

    @_guarded
    def flush(self) -> None:
        """Write and commit every complete record now. Where that fails, the newest records are kept and tried again."""
        self._flushed = time.perf_counter()  # first, so that a full disk is tried again no sooner than another flush is due
        try:
            self._writer.flush()
        except Exception as error:
            self._cannot_write(error)

    def close(self) -> None:
        """Detach from the optimizers and commit what was recorded. Closing twice is harmless."""
        # A forked child (a data loader's worker) shares the files but not the right to write them.
        if not self._handles or os.getpid() != self._process:
            return
        self._detach()
        self._finish()
        if not any(watched.seen for watched in self._watched):
            log.warning(
                "optiscope: no step of %s was seen; attach to the very objects whose step() is called",
                ", ".join(w.label for w in self._watched),
            )

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        still_open.discard(self)

    @_guarded
    def _finish(self) -> None:
        self._end_record()
        self._scalars.hand_over()
        self.flush()

    # At every step of every watched optimizer: a count and a comparison. A class whose `step` calls that of its base runs
    # the hooks twice, the inner call within the outer: the first end of a step is its end.

    @_disable_dynamo
    def _before_step(self, watched: Watched, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        watched.stepping = True
        if max(self.step, watched.steps + 1) < self._cadence.due:
            return None
        return self._take_snapshots(watched, args, kwargs)

    @_disable_dynamo
    def _after_step(self, watched: Watched, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not watched.stepping:
            return
        watched.stepping = False
        watched.seen = True
        watched.steps += 1
        watched.note_skip()
        if watched.steps > self.step:
            self.step = watched.steps
        if watched.snapshot_steps == watched.steps - 1:
            self._observe(watched)

    # On recorded steps only.

    @_guarded
    def _take_snapshots(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # reading anything would break the capture of a CUDA graph
        self._take_off_skipped(watched)
        step = max(self.step, watched.steps + 1)
        if self._record and step > self._record_step + self._cadence.patience:
            self._end_record()
        if not self._record and step >= self._cadence.due and self._cadence.affords(step, *self._spent_and_elapsed()):
            self._begin_record(step)
        if not self._record or watched.label not in self._record_waits_for:
            return None
        watched.take_snapshots()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._see_gradients(watched)
            return None
        # The gradient is born inside the step, in the closure.
        observed = functools.partial(self._run_closure, watched, closure)
        return (args, {**kwargs, "closure": observed}) if "closure" in kwargs else ((args[0], observed, *args[2:]), kwargs)

    def _run_closure(self, watched: Watched, closure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loss = closure(*args, **kwargs)
        self._see_gradients(watched)
        return loss

    @_guarded
    def _see_gradients(self, watched: Watched) -> None:
        for snapshot in watched.snapshots:
            self._see_gradient(watched, snapshot)

    @_guarded
    def _see_gradient(self, watched: Watched, snapshot: Snapshot) -> None:
        snapshot.see_gradient(watched.state_of(snapshot.matrix), getattr(watched.optimizer, "grad_scale", None))

    @_guarded
    def _observe(self, watched: Watched) -> None:
        # All of torch's work first, then all of NumPy's: alternating, their thread pools wait for each other. Every list
        # lets go of a matrix once it is measured, so that memory holds the float64 copies of one at a time.
        snapshots, watched.snapshots = watched.snapshots, []
        if self._take_off_skipped(watched):
            return  # the scaler skipped this step; the record waits for the next
        observations: list[tuple[Matrix, Observation]] = []
        while snapshots:
            self._observe_one(watched, snapshots.pop(), observations)
        while observations:
            self._measure(*observations.pop())
        self._record_waits_for.discard(watched.label)
        if not self._record_waits_for:
            self._end_record()

    @_guarded
    def _observe_one(self, watched: Watched, snapshot: Snapshot, observations: list[tuple[Matrix, Observation]]) -> None:
        if (seen := snapshot.observe(watched.state_of(snapshot.matrix))) is not None:
            observations.append((snapshot.matrix, seen))

    @_guarded
    def _measure(self, matrix: Matrix, seen: Observation) -> None:
        if "update" in self._record:
            self._fill("update", matrix, measure_update(seen))
        if "geometry" in self._record and matrix.geometry and seen.ns_input is not None:
            measured = measure_geometry(seen)
            if seen.newton_schulz is not None:
                measured["ns_schedule"] = self._ns_schedule(seen.newton_schulz)
            self._fill("geometry", matrix, measured)

    def _fill(self, group: str, matrix: Matrix, measured: Measured) -> None:
        row = self._row_of[group][matrix]
        for name, value in measured.items():
            self._record[group][name][row] = value

    def _take_off_skipped(self, watched: Watched) -> bool:
        if watched.skipped is None or not watched.take_off_skipped():
            return False
        self.step = max(w.steps for w in self._watched)
        return True

    def _ns_schedule(self, newton_schulz: NewtonSchulz) -> int:
        """Index of the schedule in the run's list of those that were in force, added when new."""
        schedules: list[dict[str, Any]] = self._writer.attributes["geometry"]["ns_schedules"]
        entry = {"coefficients": [list(triple) for triple in newton_schulz.coefficients], "eps": newton_schulz.eps}
        if entry not in schedules:
            schedules.append(entry)
        return schedules.index(entry)

    def _begin_record(self, step: int) -> None:
        self._record_step = step
        self._record_waits_for = {w.label for w in self._watched if w.matrices}
        self._record = {group: empty_rows(group, len(rows)) for group, rows in self._row_of.items()}
        self._spent_before = self._clock.wall

    def _end_record(self) -> None:
        """Hand the record to the writer; what an optimizer that did not step would have filled stays missing."""
        if not self._record:
            return
        record, self._record = self._record, {}
        full = [self._writer.append(group, self._record_step, rows) for group, rows in record.items()]
        self._log_own_time()
        if any(full):
            self.flush()
        self._flush_if_due()
        spent, elapsed = self._spent_and_elapsed()
        self._cadence.recorded(self._record_step, spent - self._spent_before, spent, elapsed)

    def _spent_and_elapsed(self) -> tuple[float, float]:
        return self._clock.wall, time.perf_counter() - self._begun

    @_guarded
    def _log_own_time(self) -> None:
        self._scalars.begin(self.step)
        spent, elapsed = self._spent_and_elapsed()
        self._scalars.set_own(overhead_seconds=spent, overhead_cpu_seconds=self._clock.cpu, elapsed_seconds=elapsed)

    def _flush_if_due(self) -> None:
        if time.perf_counter() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _failed(self, error: Exception) -> None:
        if self._raise_errors:
            raise error
        self.errors += 1
        self._count("errors")
        if self.errors == 1:
            log.warning(
                "optiscope: recording failed at step %d (%s: %s). Training goes on; what failed is missing from this record, the next one "
                "is tried as usual, further failures are counted without a message.", self.step, type(error).__name__, error,
            )  # fmt: skip

    def _cannot_write(self, error: Exception) -> None:
        if self._raise_errors:
            raise error
        if isinstance(error, TakenOver):
            log.warning("optiscope: %s; this one has detached, and what it had not committed is lost.", error)
            self._detach()
            return
        self._write_failures += 1
        dropped = self._writer.trim()
        self.dropped += dropped
        self._count("dropped", dropped)
        if self._write_failures == 1:
            log.warning(
                "optiscope: %s could not be written (%s: %s). Training goes on; the newest records are kept in memory and tried again, "
                "further failures are counted without a message.", self.store, type(error).__name__, error,
            )  # fmt: skip

    def _count(self, attribute: str, more: int = 1) -> None:
        """Add to a counter among the run's attributes; the next commit writes it."""
        attributes = self._writer.attributes[""]
        attributes[attribute] = attributes.get(attribute, 0) + more
