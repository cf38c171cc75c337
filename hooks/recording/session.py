"""One recording of one training: what the steps' hooks write into, and what curvature, schedules, guards and listeners may use of it."""

import functools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import nn
from torch._C import _set_grad_enabled
from torch.utils.hooks import RemovableHandle

from ...diagnostics.operators import OperatorRule
from ..observing.layers import hookable_layers
from ..observing.matrices import Names
from ..observing.matrix import Matrix
from ..observing.watched import Watched
from ..ranks.no_store import RunWriter
from ..ranks.ranks import Ranks
from .agreed_cadence import AgreedCadence
from .cadence import Cadence
from .journal import Journal
from .layout import Layout, include_new_parameters
from .lifetime import still_open
from .provenance import describe_optimizer
from .record import Record
from .steps_seen import StepsSeen
from .under_way_together import under_way
from .worker import Worker

log = logging.getLogger("optiscope")

T = TypeVar("T")


class Session:
    """Watches optimizers and writes a run, from `attach` to `close`.

    Attributes:
        step: optimizer steps taken.
        first_step: of them, those taken before it was attached.
        store: where the run is.
        watched: the optimizers; none once it has ended.
        layout: which row of which group belongs to which matrix.
        cadence: when the next record is due.
        journal: what becomes of records, scalars and troubles.
        under_way: the record being filled.
        ranks: where several record together, this one's place among them.
    """

    def __init__(
        self,
        names: Names,
        layout: Layout,
        writer: RunWriter,
        cadence: Cadence | AgreedCadence,
        first_step: int,
        *,
        raise_errors: bool,
        background: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.step = self.first_step = first_step
        self.store = writer.path.resolve()
        self.watched: list[Watched] = []
        self.layout = layout
        self.cadence = cadence
        self.journal = Journal(writer, first_step, raise_errors, Worker() if background else None)
        self.ranks = ranks
        self.under_way = under_way(layout, cadence, self.journal, ranks)
        self._writer = writer
        self._names = names
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._later: deque[Callable[[], object]] = deque()  # what was asked for within the recorder's own work
        self._extra: list[Layout] = []
        self._handles: dict[Watched, list[RemovableHandle]] = {}
        self._steps_seen = StepsSeen()
        self._told_of_changes = False

    def begin(self) -> None:
        """From here on the interpreter's end closes it, if nobody does before."""
        still_open.add(self)

    def abandon(self) -> None:
        """Take it back before anything was recorded: an exception has cut off its beginning."""
        still_open.discard(self)
        self._let_go()

    # Its state.

    @property
    def is_open(self) -> bool:
        """Whether steps are watched: from `attach` to `close`, in the process that attached."""
        return bool(self._handles) and os.getpid() == self._process

    @property
    def in_background(self) -> bool:
        """Whether records are measured in a thread of their own."""
        return self.journal.worker is not None

    @property
    def raises(self) -> bool:
        """Whether failures are raised, as in tests, instead of told."""
        return self.journal.raise_errors

    @property
    def model(self) -> nn.Module | None:
        """The model that names come from; None where there is none."""
        return self._names.model

    @property
    def operators(self) -> OperatorRule | None:
        """The user's own naming of operators; None where there is none."""
        return self._names.rule

    @property
    def groups(self) -> Collection[str]:
        """Groups of quantities that records hold."""
        return self.layout.row_of

    @property
    def matrices(self) -> list[Matrix]:
        """All that are recorded."""
        return [matrix for watched in self.watched for matrix in watched.matrices]

    @property
    def created(self) -> Any:
        """When the run was begun."""
        return self.journal.attributes.get("created")

    def watching(self, optimizer: Any) -> Watched | None:
        """How an optimizer, or one that it wraps, is watched; None where it is not."""
        layers = hookable_layers(optimizer)
        return next((one for one in self.watched if any(layer is other for layer in layers for other in one.layers)), None)

    # Work, whose exceptions stay out of the training.

    def guarded(self, action: Callable[..., T], *args: Any) -> T | None:
        """Do something, and keep every exception of it out of the training; then, and in a forked child, the answer is None."""
        # A forked child (a data loader's worker) shares the files but not the right to write them, and has no second thread.
        if os.getpid() != self._process:
            return None
        outermost, grad_enabled = not self._is_at_work(), torch.is_grad_enabled()
        result = None
        try:
            # Optimizers may step in threads of their own.
            with self._lock:
                try:
                    with self.journal.guard(self.step):
                        result = action(*args)
                finally:
                    # Again: an exception of a signal handler may have come as the guard's end began. None can before this call is done.
                    _set_grad_enabled(grad_enabled)
                    if outermost:
                        self.journal.clock.end()
        finally:
            if outermost:
                self._catch_up()
        return result

    def in_turn(self, action: Callable[..., object], *args: Any) -> None:
        """Do something :meth:`guarded`; when the recorder's work ends, where this very thread is within some: a signal handler that interrupted that, or a listener, asks for it.

        Neither could wait for that end, and half of what the work does may be done.
        """
        if self._is_at_work():
            self._later.append(functools.partial(self.guarded, action, *args))
        else:
            self.guarded(action, *args)

    def _is_at_work(self) -> bool:
        """Whether the calling thread is. The lock itself tells: a flag could be left standing by an exception of a signal handler."""
        found: bool = self._lock._is_owned()  # type: ignore[attr-defined]
        return found

    def _catch_up(self) -> None:
        """After a piece of work: do what was asked for within it; and end, where another recorder has taken the run over."""
        while self._later:
            self._later.popleft()()
        worker = self.journal.worker
        is_over = self.journal.taken_over or (self.ranks is not None and self.ranks.over is not None)
        if is_over and self in still_open and not (worker is not None and worker.busy):
            self.close(compact=False)

    def guard(self) -> AbstractContextManager[None]:
        """Keeps exceptions of a block out of the training; its time is the recorder's."""
        return self.journal.guard(self.step)

    def on_request(self) -> AbstractContextManager[None]:
        """Time of a block is what the user asked for at a cadence of their own: records are not spaced by it."""
        return self.journal.asked_for()

    # What the run is told.

    def log(self, scalars: Mapping[str, Any], *, counted: bool = True) -> None:
        """Record numbers at the current step. After the end they are written at once.

        Calls that are `counted` tell of a training's loop: after many without a step it is said that none is seen.
        """
        self.journal.log(self.step, scalars)
        if self._handles:
            if counted:
                self._steps_seen.logged(self.step, self.watched)
            # Not before the last record was heard of: up to then a busy worker is one that measures.
            self.journal.flush_if_due(self.step, self.under_way.ended is None)
        else:
            self._finish(compact=False)

    def look_for_steps(self) -> None:
        """Say of optimizers that seem not to step any more that they do not."""
        self._steps_seen.look(self.step, self.watched)
        self._steps_seen.compare(self.model, self.watched)

    def flush(self) -> None:
        """Write and commit every complete record now."""
        self.under_way.wait(self.step)
        self.journal.flush()

    def tell(self, name: str, entries: Iterable[dict[str, Any]], limit: int | None = None) -> None:
        """Add entries to a list among the run's attributes, without those that it holds already, up to `limit` of them; the next commit writes it."""
        self.journal.note(functools.partial(self._tell, name, list(entries), limit))

    def _tell(self, name: str, entries: list[dict[str, Any]], limit: int | None) -> None:
        told = self.journal.attributes.setdefault(name, [])
        new = [entry for entry in entries if entry not in told]
        told += new if limit is None else new[: max(limit - len(told), 0)]

    def settle(self) -> None:
        """Wait until all that was recorded is written; know of skipped steps, and of parameters that came since."""
        self.under_way.wait(self.step)
        for watched in self.watched:
            self.take_off_skipped(watched)
        if self.under_way.record is None:  # the rows of one that is being filled are as many as its matrices
            self.include_new_parameters()

    def extra_layout(self, groups: Sequence[str]) -> Layout:
        """A layout of groups of its own beside those that records hold; :meth:`append` takes their rows."""
        self._extra.append(Layout(self._writer, groups))
        return self._extra[-1]

    def append(self, rows: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
        """Add rows by group at the current step, after :meth:`settle`, to what records hold of it."""
        self.journal.append(rows, self.step)
        self.journal.log_own_time(self.step)

    def on_record(self, listener: Callable[[Record], None]) -> RemovableHandle:
        """Call `listener` with every record as soon as it is complete; the handle ends it."""
        return self.under_way.listen(listener)

    # The optimizers.

    def add(self, watched: Watched) -> list[RemovableHandle]:
        """Record one more optimizer; the handles that are put into the list remove its hooks at the end."""
        watched.watched_from = self.step
        handles: list[RemovableHandle] = []
        self._handles[watched] = handles
        self.watched.append(watched)
        return handles

    def replaced_by(self, new: Watched) -> list[Watched]:
        """The watched optimizers all of whose matrices a new one holds: it was made in their place, and goes on in their rows where it is of their class."""
        held = new.parameters
        found = [one for one in self.watched if one.matrices and {id(m.parameter) for m in one.matrices} <= held]
        new.label = next((one.label for one in found if type(one.optimizer) is type(new.optimizer)), new.label)
        return found

    def retire(self, watched: Watched) -> None:
        """Record one optimizer no more."""
        self._unhook(watched)
        self.watched.remove(watched)
        watched.let_go()

    def _unhook(self, watched: Watched) -> None:
        for handle in self._handles.pop(watched, ()):
            handle.remove()

    def describe(self, watched: Watched) -> None:
        """Tell the run how an optimizer is read, as is known now."""
        self.journal.note(functools.partial(self.journal.describe, describe_optimizer(watched)))

    def take_off_skipped(self, watched: Watched) -> bool:
        """Take steps that a GradScaler skipped off the count; whether there were any."""
        if watched.skipped is None or not watched.take_off_skipped():
            return False
        self.step = max(w.steps for w in self.watched)
        return True

    def see_changes(self, watched: Watched) -> None:
        """See which weights something else than the optimizer has changed since its last step, and say so once."""
        watched.changed = watched.changed_since()
        count = sum(value == 1 for value in watched.changed.values())
        if count and not self._told_of_changes:
            self._told_of_changes = True
            log.warning(
                "optiscope: weights of %d matrices of %s changed between its steps, before step %d (a clip, a swap with an average, a load): what is "
                "recorded is what the steps do; changed_outside marks such records.", count, watched.label, watched.steps + 1,
            )  # fmt: skip

    def include_new_parameters(self) -> None:
        """Give parameters that came since their rows in the run; where ranks record together, those stay that were there at the roll call."""
        if self.ranks is not None:
            return
        with self.journal.writing(OSError):
            include_new_parameters(self.layout, self.watched, self._names, lambda: self.under_way.wait(self.step))

    # Its end.

    def close(self, *, compact: bool = True) -> None:
        """Detach from the optimizers and commit what was recorded, in turn. Closing twice is harmless."""
        self.in_turn(self._close, compact)

    def _close(self, compact: bool) -> None:
        if self not in still_open:
            return
        for watched in list(self._handles):
            self._unhook(watched)
        self._finish(compact)
        still_open.discard(self)  # only now: what an interrupt left unwritten is for the interpreter's end
        self._steps_seen.end(self.step, self.watched)
        self._let_go()

    def _finish(self, compact: bool) -> None:
        self.guarded(self._end, compact)

    def _end(self, compact: bool) -> None:
        try:
            self.under_way.close(self.step)
            if self.journal.worker is not None:
                self.under_way.end_worker(self.journal.worker, self.step)
        finally:
            if self.ranks is not None:
                self.ranks.leave()
            self.journal.end(compact)

    def _let_go(self) -> None:
        """Of the model, its parameters and the optimizers: a recorder may be kept for what it counted."""
        for watched in list(self._handles):
            self._unhook(watched)
        for watched in self.watched:
            watched.let_go()
        self.watched = []
        self._names.model = None
        for layout in (self.layout, *self._extra):
            layout.keep(())
