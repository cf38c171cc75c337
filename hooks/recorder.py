"""Attaching to optimizers: the recorder that watches their steps and writes what it measures."""

import functools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..diagnostics.store.writer import Writer
from .curvature import recording
from .curvature.group import CurvatureGroup
from .observing.capturing import REFUSED, capturing
from .observing.closures import observed
from .observing.matrices import Names
from .observing.snapshot import Snapshot
from .observing.watched import Watched, watch
from .recording.cadence import Cadence
from .recording.guarding import guarded, in_turn
from .recording.journal import Journal
from .recording.layout import Layout, include_new_parameters
from .recording.lifetime import still_open
from .recording.measuring import Readings
from .recording.provenance import describe_optimizer
from .recording.record import Record
from .recording.under_way import UnderWay
from .recording.worker import Worker

log = logging.getLogger("optiscope")


class Recorder:
    """Watches optimizers and writes a run; made by :func:`attach`.

    Attributes:
        step: optimizer steps taken.
        first_step: of them, those taken before it was attached.
        store: where the run is.
    """

    def __init__(
        self, watched: list[Watched], names: Names, layout: Layout, writer: Writer, cadence: Cadence, first_step: int, *,
        raise_errors: bool, background: bool = False,
    ) -> None:  # fmt: skip
        self.step = self.first_step = first_step
        self.store = writer.path.resolve()
        self._watched = watched
        self._names = names
        self._layout = layout
        self._curvature = CurvatureGroup(writer)
        self._cadence = cadence
        self._journal = Journal(writer, first_step, raise_errors, Worker() if background else None)
        self._under_way = UnderWay(layout, cadence, self._journal)
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._later: deque[Callable[[], object]] = deque()  # what was asked for within the recorder's own work
        self._told_of_changes = False
        self._handles = [handle for one in watched for handle in self._hook(one)]
        still_open.add(self)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(compact=kind is None)

    @property
    def watched(self) -> tuple[Watched, ...]:
        """The optimizers that it watches, with their labels and matrices; none once it is closed."""
        return tuple(self._watched)

    @property
    def errors(self) -> int:
        """How many measurements failed."""
        return self._journal.errors

    @property
    def dropped(self) -> int:
        """Steps of which a record, or scalars alone, were lost because for long the store could not be written, or the background's thread was busy."""
        return self._journal.dropped

    @property
    def missed(self) -> int:
        """Records that were due while the one before was still being measured in the background."""
        return self._journal.missed

    @property
    def overhead_seconds(self) -> float:
        """Wall time that recording has taken from the training thread."""
        return self._journal.clock.wall

    @property
    def overhead_cpu_seconds(self) -> float:
        """CPU time that recording has taken: of all threads; in the background of the training thread and the worker's."""
        return self._journal.cpu

    @property
    def background_cpu_seconds(self) -> float:
        """CPU time of the worker's thread; 0 where recording is not in the background."""
        return self._journal.worker_clock.finished_cpu

    @in_turn
    @guarded
    def log(self, /, **scalars: Any) -> None:
        """Record numbers of your own (loss, accuracy, …) at the current step; several calls at one step are merged.

        A tensor is read with `float()`, which waits for an accelerator: log only as often as you would print. A slash in
        a name, which in the store would mean a group, becomes a dot. After `close` they are written at once.
        """
        self._journal.log(self.step, scalars)
        if self._handles:
            # Not before the last record was heard of: up to then a busy worker is one that measures.
            self._journal.flush_if_due(self.step, self._under_way.ended is None)
        else:
            self._finish(compact=False)

    @in_turn
    @guarded
    def flush(self) -> None:
        """Write and commit every complete record now. Where that fails, the newest records are kept and tried again."""
        self._under_way.wait(self.step)
        self._journal.flush()

    curvature = in_turn(guarded(recording.curvature))

    def watch(self, *optimizers: Any, steps: int | None = None) -> None:
        """Record further optimizers, made after `attach`; those that are watched already stay as they are.

        Their matrices get their rows in the run at the next record. (Parameters that are added to a watched optimizer need no call.)
        `steps` are those that count as taken by them, by default all that the recorder has counted.

        Raises:
            TypeError: something is no optimizer.
        """
        new = watch(optimizers, self._watched) if self._handles else []  # one that is closed stays closed
        for one in new:
            one.steps = self.step if steps is None else steps
            self._journal.note(functools.partial(self._journal.describe, describe_optimizer(one)))
            self._handles += self._hook(one)
        self._watched += new

    def on_record(self, listener: Callable[[Record], None]) -> RemovableHandle:
        """Call `listener` with every record as soon as it is complete: behind the step that completed it, its rows handed to the writer.

        A record knows its `step`, its `rows` by group and, in `row_of`, which row is which matrix. They are the writer's too: look, do
        not change them. What the listener raises is counted and told of like any other error of the recorder. Its time is on
        the recorder's clock, but records are not spaced by it. What it calls of the recorder (`log`, `flush`, `curvature`, `close`) is done
        when the listeners have returned. In the background it is called behind the first step by whose end the record is written, which is later
        and depends on chance; in the training thread as ever.

        Returns:
            A handle, whose `remove()` ends it.

        Raises:
            ValueError: the recorder is closed.
        """
        if not self._handles:
            raise ValueError("recorder: expected one that is open, got one that is closed and makes no more records; attach again")
        return self._under_way.listen(listener)

    @in_turn
    @guarded
    def close(self, *, compact: bool = True) -> None:
        """Detach from the optimizers and commit what was recorded. Closing twice is harmless.

        With `compact`, a run of more than 1,024 records is then laid out for reading, which may take seconds; it is not when the process is being ended.
        A signal handler may call it: where it interrupts the recorder's own work, this is finished first, and the recorder closed as soon as it is.
        """
        if self not in still_open:
            return
        self._detach()
        self._finish(compact)
        still_open.discard(self)  # only now: what an interrupt left unwritten is for the interpreter's end
        if not any(watched.seen for watched in self._watched):
            log.warning(
                "optiscope: no step of %s was seen; attach to the very objects whose step() is called (steps replayed from a CUDA graph call none)", ", ".join(w.label for w in self._watched),
            )  # fmt: skip
        self._let_go()

    def _let_go(self) -> None:
        """Of the model, its parameters and the optimizers: a recorder may be kept for what it counted."""
        for watched in self._watched:
            watched.let_go()
        self._watched = []
        self._names.model = None
        self._layout.keep(())
        self._curvature.include(())

    def _catch_up(self) -> None:
        """Behind a piece of work: do what was asked for within it; and end, where another recorder has taken the run over."""
        while self._later:
            self._later.popleft()()
        worker = self._journal.worker
        if self._journal.taken_over and self in still_open and not (worker is not None and worker.busy):
            self.close(compact=False)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @guarded
    def _finish(self, compact: bool) -> None:
        with self._journal.ending(compact):
            self._under_way.end(self.step)
            if self._journal.worker is not None:
                self._under_way.end_worker(self._journal.worker, self.step)

    def _hook(self, watched: Watched) -> list[RemovableHandle]:
        before, after = functools.partial(self._before_step, watched), functools.partial(self._after_step, watched)
        return [h for one in watched.layers for h in (one.register_step_pre_hook(before), one.register_step_post_hook(after))]

    # At every step of every watched optimizer: a count and a comparison.

    @_disable_dynamo
    def _before_step(self, watched: Watched, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if capturing():
            self._refuse_capture(watched)
            return None
        if watched.enter():
            watched.snapshots = []  # of a step that an exception left
            if max(self.step, watched.steps + 1) >= self._cadence.due:
                self._take_snapshots(watched)
        recorded = watched.snapshots and watched.snapshot_steps == watched.steps
        if (recorded or watched.identification is not None) and optimizer is watched.optimizer:
            return self._await_gradients(watched, args, kwargs)
        return None

    @_disable_dynamo
    def _after_step(self, watched: Watched, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if capturing() or not watched.leave():  # what is captured is not carried out
            return
        watched.seen = True
        watched.steps += 1
        if hasattr(watched.optimizer, "found_inf"):
            self._note_skip(watched)
        if watched.steps > self.step:
            self.step = watched.steps
        if self._under_way.is_written:
            self._hear_of_record()
        if watched.snapshot_steps == watched.steps - 1:
            self._observe(watched)
        if watched.identification is not None:
            self._identify(watched)
        if watched.steps + 1 >= self._cadence.due and self._is_next(watched.steps):
            self._note_weights(watched)
        else:
            watched.forget_weights()

    def _refuse_capture(self, watched: Watched) -> None:
        if not watched.captured:
            watched.captured = True
            log.warning(REFUSED, watched.label)

    @guarded
    def _hear_of_record(self) -> None:
        self._under_way.hear(self.step)

    # In the first steps of an optimizer whose class is not in the adapter table.

    @guarded
    def _identify(self, watched: Watched) -> None:
        if watched.identify(after_step=True):
            self._journal.note(functools.partial(self._journal.describe, describe_optimizer(watched)))

    @guarded
    def _note_skip(self, watched: Watched) -> None:
        watched.note_skip()

    @guarded
    def _is_next(self, step: int) -> bool:
        return self._under_way.is_next(step)

    # On recorded steps only.

    @guarded
    def _note_weights(self, watched: Watched) -> None:
        watched.note_weights()

    @guarded
    def _take_snapshots(self, watched: Watched) -> None:
        self._take_off_skipped(watched)
        step = max(self.step, watched.steps + 1)
        under_way = self._under_way
        if under_way.record is not None and step > under_way.record.step + self._cadence.patience:
            under_way.end(self.step)
        if under_way.record is None and step >= self._cadence.due and under_way.may_begin(step):
            self._include_new_parameters()
            under_way.begin(step, {w.label for w in self._watched if w.matrices})
        if under_way.record is None or watched.label not in under_way.record.waits_for:
            return
        self._see_changes(watched)
        watched.take_snapshots(self._layout.row_of, under_way.memory)

    @guarded
    def _await_gradients(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See the gradients now, or when the closure that the step was given has made them."""
        given = observed(functools.partial(self._see_gradients, watched), args, kwargs)
        if given is None:
            self._see_gradients(watched)
        return given

    @guarded
    def _see_gradients(self, watched: Watched) -> None:
        for snapshot in watched.snapshots:
            self._see_gradient(snapshot, getattr(watched.optimizer, "grad_scale", None))
        if watched.identification is not None:
            watched.identify(after_step=False)

    @guarded
    def _see_gradient(self, snapshot: Snapshot, grad_scale: Tensor | None) -> None:
        snapshot.see_gradient(grad_scale)

    def _see_changes(self, watched: Watched) -> None:
        """See which weights something else than the optimizer has changed since its last step, and say so once."""
        watched.changed = watched.changed_since()
        count = sum(value == 1 for value in watched.changed.values())
        if count and not self._told_of_changes:
            self._told_of_changes = True
            log.warning(
                "optiscope: weights of %d matrices of %s changed between its steps, before step %d (a clip, a swap with an average, a load): what is "
                "recorded is what the steps do; changed_outside marks such records.", count, watched.label, watched.steps + 1,
            )  # fmt: skip

    @guarded
    def _observe(self, watched: Watched) -> None:
        snapshots, watched.snapshots = watched.snapshots, []
        if self._take_off_skipped(watched):
            return  # the scaler skipped this step; the record waits for the next
        part = Readings(watched.matrices, {matrix: {"changed_outside": value} for matrix, value in watched.changed.items()})
        part.read(snapshots, self._journal, self.step)
        self._under_way.add(watched.label, part, self.step)

    def _take_off_skipped(self, watched: Watched) -> bool:
        if watched.skipped is None or not watched.take_off_skipped():
            return False
        self.step = max(w.steps for w in self._watched)
        return True

    @guarded
    def _include_new_parameters(self) -> None:
        with self._journal.writing(OSError):
            include_new_parameters(self._layout, self._watched, self._names, lambda: self._under_way.wait(self.step))
