"""What is done around the steps of one optimizer: at every step a count and a comparison, on recorded steps reading what the step saw and did."""

import functools
import logging
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..observing.capturing import REFUSED, capturing
from ..observing.closures import observed
from ..observing.fingerprints import Fingerprints, of_gradients, of_results
from ..observing.piece_snapshot import PieceSnapshot
from ..observing.snapshot import Snapshot
from ..observing.watched import Watched
from .record import Readings
from .session import Session

log = logging.getLogger("optiscope")


def watch_steps(session: Session, watched: Watched) -> None:
    """Let the session see the steps of one more optimizer, until it ends."""
    hooks = _StepHooks(session, watched)
    before, after = hooks.before, hooks.after
    handles = session.add(watched)
    for optimizer in watched.layers:  # each handle at once where the session finds it, should an exception of a signal handler cut this off
        handles.append(optimizer.register_step_pre_hook(before))
        handles.append(optimizer.register_step_post_hook(after))


class _StepHooks:
    """The hooks of one optimizer, and of what wraps it."""

    def __init__(self, session: Session, watched: Watched) -> None:
        self._session, self._watched = session, watched
        self._gradients: Fingerprints = {}  # where ranks record together, of this step

    # At every step.

    @_disable_dynamo
    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session, watched = self._session, self._watched
        if capturing():
            self._refuse_capture()
            return None
        if watched.enter():
            watched.snapshots = []  # of a step that an exception left
            if session.ranks is not None:
                session.ranks.place.begun += 1
            if max(session.step, watched.steps + 1) >= session.cadence.due:
                session.guarded(self._take_snapshots)
        recorded = (watched.snapshots or session.ranks is not None) and watched.snapshot_steps == watched.steps
        if (recorded or watched.identification is not None) and optimizer is watched.optimizer:
            return session.guarded(self._await_gradients, args, kwargs)
        return None

    @_disable_dynamo
    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        session, watched = self._session, self._watched
        if capturing() or not watched.leave():  # what is captured is not carried out
            return
        watched.steps += 1
        if hasattr(watched.optimizer, "found_inf"):
            session.guarded(watched.note_skip)
        if watched.steps > session.step:
            session.step = watched.steps
        watched.note_step(session.step)
        if session.under_way.is_written:
            session.guarded(session.under_way.hear, session.step)
        if watched.snapshot_steps == watched.steps - 1:
            session.guarded(self._observe)
        if watched.identification is not None:
            session.guarded(self._identify)
        if watched.steps + 1 >= session.cadence.due and session.guarded(session.under_way.is_next, watched.steps):
            session.guarded(watched.note_weights)
        else:
            watched.forget_weights()

    def _refuse_capture(self) -> None:
        if not self._watched.captured:
            self._watched.captured = True
            log.warning(REFUSED, self._watched.label)

    # In the first steps of an optimizer whose class is not in the adapter table.

    def _identify(self) -> None:
        if self._watched.identify(after_step=True):
            self._session.describe(self._watched)

    # On recorded steps only.

    def _take_snapshots(self) -> None:
        session, watched = self._session, self._watched
        session.take_off_skipped(watched)
        step = max(session.step, watched.steps + 1)
        under_way = session.under_way
        if under_way.record is not None and step > under_way.record.step + session.cadence.patience:
            under_way.end(session.step)
        if under_way.record is None and step >= session.cadence.due and under_way.may_begin(step):
            session.look_for_steps()
            session.include_new_parameters()
            under_way.begin(step, {one.label for one in session.watched if one.matrices} or {one.label for one in session.watched})
        if under_way.record is None or watched.label not in under_way.record.waits_for:
            return
        session.see_changes(watched)
        watched.take_snapshots(session.layout.row_of, under_way.memory, under_way.is_elsewhere)

    def _await_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See the gradients now, or when the closure that the step was given has made them."""
        see = functools.partial(self._session.guarded, self._see_gradients, args, kwargs)
        given = observed(see, args, kwargs)
        if given is None:
            self._see_gradients(args, kwargs)
        return given

    def _see_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watched = self._watched
        if watched.snapshots:
            self._session.guarded(watched.note_arguments, args, kwargs)
            self._session.guarded(watched.watch_step, args, kwargs)
            if self._session.guarded(watched.check_row, args, kwargs):
                self._session.describe(watched)
        for snapshot in watched.snapshots:
            self._session.guarded(self._see_gradient, snapshot, getattr(watched.optimizer, "grad_scale", None))
        if self._session.ranks is not None:
            self._gradients = of_gradients(watched, self._session.ranks.has_copies)
        if watched.identification is not None:
            watched.identify(after_step=False)

    @staticmethod
    def _see_gradient(snapshot: Snapshot | PieceSnapshot, grad_scale: Tensor | None) -> None:
        snapshot.see_gradient(grad_scale)

    def _observe(self) -> None:
        session, watched = self._session, self._watched
        session.guarded(watched.compare_watched)
        snapshots, watched.snapshots = watched.snapshots, []
        if session.take_off_skipped(watched):
            return  # the scaler skipped this step; the record waits for the next
        readings = Readings(watched.matrices, {matrix: {"changed_outside": value} for matrix, value in watched.changed.items()})
        readings.read(snapshots, session.journal, session.step)
        if session.ranks is not None:
            readings.has_state = watched.has_state()
            readings.fingerprints = {**self._gradients, **of_results(watched, session.ranks.has_copies)}
            readings.place = session.ranks.place.now()
        if watched.watching is not None and watched.watching.learned():
            session.describe(watched)
        session.under_way.add(watched.label, readings, session.step)
