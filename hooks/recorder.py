"""Attaching to optimizers: the recorder that watches their steps and writes what it measures."""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ..diagnostics.catalogue import GROUPS
from ..diagnostics.observation import NewtonSchulz, Observation, measure_geometry, measure_update
from ..diagnostics.operators import OperatorRule
from .adapters import State, adapter_for
from .cadence import Cadence, Stopwatch
from .layout import create_scalar, empty_rows, lay_out
from .matrices import Matrix, find_matrices, label_optimizers
from .provenance import describe_optimizers, describe_software
from .snapshot import Snapshot, take_snapshot
from .writer import Writer

log = logging.getLogger("optiscope")

FLUSH_SECONDS = 30.0

P = ParamSpec("P")
T = TypeVar("T")

_attached: "set[Recorder]" = set()


def _close_all() -> None:
    for recorder in list(_attached):
        recorder.close()


# What a script leaves open is closed when the interpreter exits. Not by `atexit`: that runs when threads can no longer be
# started, and Zarr writes through them. concurrent.futures, which it uses for that, registers its own end the same way.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]


def attach(
    optimizers: Optimizer | Iterable[Optimizer],
    model: nn.Module | None,
    store: str | Path,
    *,
    every: int | None = None,
    overhead: float = 0.01,
    measure: Sequence[str] = GROUPS,
    operators: OperatorRule | None = None,
    first_step: int | None = None,
    on_error: Literal["warn", "raise"] = "warn",
) -> "Recorder":
    """Record what `optimizers` do to the matrices of `model`, into the run at `store`.

    Training is bitwise what it would be without: nothing is changed, no random number is drawn, and no exception of the
    recorder leaves a hook. Use the result as a context manager, or call its `close()`; the run can be read meanwhile.

    Args:
        optimizers: one `torch.optim.Optimizer` or several. They share one step counter: the number of steps of the one
            that has stepped most.
        model: where parameter names come from; without it they are numbered by optimizer and group.
        store: a path for the run. An existing run of the same matrices is continued.
        every: record every N-th step; None spaces records so that they take at most `overhead` of the time.
        overhead: share of training time that recording may take, with `every=None`.
        measure: groups of quantities to record, of "geometry" and "update".
        operators: your own naming: a mapping from regular expressions to operator types, or a function of the name.
        first_step: steps already taken, when training resumes; by default the last recorded step of an existing run.
        on_error: "warn": one log message when recording fails, and training goes on; "raise": for tests.

    Raises:
        TypeError: something in `optimizers` is no optimizer.
        ValueError: no matrix to record, an argument out of range, or a `store` that cannot be continued.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.Muon([model.weight], lr=0.1)
        >>> store = tempfile.mkdtemp() + "/run.zarr"
        >>> with attach(optimizer, model, store, every=1) as recorder:
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     _ = optimizer.step()
        >>> recorder.step
        1
    """
    labelled = label_optimizers(_as_optimizers(optimizers))
    if not measure or set(measure) - set(GROUPS):
        raise ValueError(f"measure: expected one or more of {', '.join(GROUPS)}; got {measure!r}")
    if on_error not in ("warn", "raise"):
        raise ValueError(f"on_error: expected 'warn' or 'raise', got {on_error!r}")
    cadence = Cadence(every, overhead)
    matrices = find_matrices(labelled, model, operators)
    rows = {"geometry": [m for m in matrices if m.geometry], "update": matrices}
    rows = {group: found for group, found in rows.items() if group in measure and found}
    if not rows:
        raise ValueError(
            f"optimizers: {', '.join(labelled)} hold no weight matrix (a parameter with two or more dimensions) to record "
            f"{' and '.join(measure)} of, so nothing can be recorded"
        )
    writer = Writer(store, {**describe_software(), "optimizers": describe_optimizers(labelled)})
    lay_out(writer, rows)
    first_step = writer.last_step if first_step is None else first_step
    if first_step < writer.last_step:
        raise ValueError(
            f"first_step: {store} already holds records up to step {writer.last_step}, got {first_step}; record to another store"
        )
    cadence.start(first_step)
    watched = [Watched(label, o, [m for m in matrices if m.optimizer == label], first_step) for label, o in labelled.items()]
    return Recorder(watched, rows, writer, cadence, first_step, raise_errors=on_error == "raise")


def _guarded(method: "Callable[Concatenate[Recorder, P], T]") -> "Callable[Concatenate[Recorder, P], T | None]":
    """Keep every exception of the recorder out of the training, and its work under no_grad and on its own clock."""

    @functools.wraps(method)
    def guarded(self: "Recorder", *args: P.args, **kwargs: P.kwargs) -> T | None:
        with self._clock, torch.no_grad():
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                self._failed(error)
                return None

    return guarded


class Watched:
    """One optimizer: its matrices, how many steps it took, and what was copied before the step under way."""

    def __init__(self, label: str, optimizer: Optimizer, matrices: list[Matrix], first_step: int) -> None:
        self.label = label
        self.optimizer = optimizer
        self.adapter = adapter_for(optimizer)
        self.matrices = matrices
        self.steps = first_step
        self.stepping = False
        self.snapshots: list[Snapshot] = []
        self.snapshot_steps = -1  # `steps` when the snapshots were taken; they are of this step only if it still is

    def state_of(self, matrix: Matrix) -> State:
        """The optimizer's state of a parameter. `get`, not `[]`: the state is a defaultdict, looking must not add to it."""
        return self.optimizer.state.get(matrix.parameter) or {}


class Recorder:
    """Watches optimizers and writes a run; made by :func:`attach`.

    Attributes:
        step: optimizer steps taken.
        errors: how many times recording failed.
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
        self._scalars: dict[str, float] = {}  # of step `_scalars_step`, not yet handed to the writer
        self._scalars_step = first_step

        self._handles = [
            handle
            for w in watched
            for handle in (
                w.optimizer.register_step_pre_hook(functools.partial(self._before_step, w)),
                w.optimizer.register_step_post_hook(functools.partial(self._after_step, w)),
            )
        ]
        _attached.add(self)

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
    def log(self, **scalars: Any) -> None:
        """Record numbers of your own (loss, accuracy, …) at the current step; several calls at one step are merged.

        A tensor is read with `float()`, which waits for an accelerator: log only as often as you would print. A slash in
        a name, which in the store would mean a group, becomes a dot.
        """
        self._begin_scalars()
        for name, value in scalars.items():
            self._scalars[name.replace("/", ".")] = float(value.detach() if isinstance(value, Tensor) else value)
        self._flush_if_due()

    @_guarded
    def flush(self) -> None:
        """Write and commit every complete record now."""
        self._flushed = time.perf_counter()  # first, so that a full disk is tried again no sooner than another flush is due
        self._writer.flush()

    def close(self) -> None:
        """Detach from the optimizers and commit what was recorded. Closing twice is harmless."""
        # A forked child (a data loader's worker) shares the files but not the right to write them.
        if not self._handles or os.getpid() != self._process:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _attached.discard(self)
        self._finish()

    @_guarded
    def _finish(self) -> None:
        self._end_record()
        self._end_scalars()
        self.flush()

    # At every step of every watched optimizer: a count and a comparison. A class whose `step` calls that of its base runs
    # the hooks twice, the inner call within the outer: the first end of a step is its end.

    def _before_step(self, watched: Watched, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        watched.stepping = True
        if max(self.step, watched.steps + 1) < self._cadence.due:
            return None
        return self._take_snapshots(watched, args, kwargs)

    def _after_step(self, watched: Watched, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not watched.stepping:
            return
        watched.stepping = False
        watched.steps += 1
        if watched.steps > self.step:
            self.step = watched.steps
        if watched.snapshot_steps == watched.steps - 1:
            self._observe(watched)

    # On recorded steps only.

    @_guarded
    def _take_snapshots(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = max(self.step, watched.steps + 1)
        if self._record and step > self._record_step + self._cadence.patience:
            self._end_record()
        if not self._record and step >= self._cadence.due and self._cadence.affords(step, *self._spent_and_elapsed()):
            self._begin_record(step)
        if not self._record or watched.label not in self._record_waits_for:
            return None
        group_of = {id(p): group for group in watched.optimizer.param_groups for p in group["params"]}
        watched.snapshots = [
            take_snapshot(m, group_of[id(m.parameter)], watched.adapter) for m in watched.matrices if id(m.parameter) in group_of
        ]
        watched.snapshot_steps = watched.steps
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
            snapshot.see_gradient(watched.state_of(snapshot.matrix))

    @_guarded
    def _observe(self, watched: Watched) -> None:
        snapshots, watched.snapshots = watched.snapshots, []
        self._record_waits_for.discard(watched.label)
        try:
            # All of torch's work first, then all of NumPy's: alternating, their thread pools wait for each other.
            observations = [(s.matrix, s.observe(watched.state_of(s.matrix))) for s in snapshots]
            for matrix, seen in observations:
                if seen is not None:
                    self._measure(matrix, seen)
        finally:
            if not self._record_waits_for:
                self._end_record()

    def _measure(self, matrix: Matrix, seen: Observation) -> None:
        measured = {"update": measure_update(seen)}
        if matrix.geometry and seen.ns_input is not None:
            measured["geometry"] = measure_geometry(seen)
            if seen.newton_schulz is not None:
                measured["geometry"]["ns_schedule"] = self._ns_schedule(seen.newton_schulz)
        for group in self._record.keys() & measured.keys():
            row = self._row_of[group][matrix]
            for name, value in measured[group].items():
                self._record[group][name][row] = value

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
        self._begin_scalars()
        if any(full):
            self.flush()
        self._flush_if_due()
        spent, elapsed = self._spent_and_elapsed()
        self._cadence.recorded(self._record_step, spent - self._spent_before, spent, elapsed)

    def _spent_and_elapsed(self) -> tuple[float, float]:
        return self._clock.wall, time.perf_counter() - self._begun

    def _begin_scalars(self) -> None:
        if self.step != self._scalars_step:
            self._end_scalars()
            self._scalars_step = self.step
        self._scalars["overhead_seconds"] = self._clock.wall
        self._scalars["overhead_cpu_seconds"] = self._clock.cpu
        self._scalars["elapsed_seconds"] = time.perf_counter() - self._begun

    def _end_scalars(self) -> None:
        scalars, self._scalars = self._scalars, {}
        if scalars:
            self._writer.append("scalars", self._scalars_step, {name: np.float64(value) for name, value in scalars.items()})
        for name in scalars:
            if not self._writer.has("scalars", name):
                self._create_scalar(name)

    @_guarded
    def _create_scalar(self, name: str) -> None:
        create_scalar(self._writer, name)

    def _flush_if_due(self) -> None:
        if time.perf_counter() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _failed(self, error: Exception) -> None:
        if self._raise_errors:
            raise error
        self.errors += 1
        self._writer.attributes[""]["errors"] = self._writer.attributes[""].get("errors", 0) + 1
        if self.errors == 1:
            log.warning(
                "optiscope: recording failed at step %d (%s: %s). Training goes on; this record is incomplete, the next one is tried "
                "as usual, further failures are counted without a message.", self.step, type(error).__name__, error,
            )  # fmt: skip


def _as_optimizers(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    found: list[Any] = [optimizers] if hasattr(optimizers, "param_groups") else list(optimizers)  # type: ignore[arg-type]
    if not found:
        raise ValueError("optimizers: expected at least one optimizer, got none")
    for optimizer in found:
        if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "register_step_pre_hook")):
            raise TypeError(f"optimizers: expected torch.optim.Optimizer objects, got {type(optimizer).__name__}")
    return found
