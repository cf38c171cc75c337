"""The runs that the trainings of one script are recorded to: where each goes, which one it goes on in, and which are too short to keep."""

import shutil
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from ..observing.layers import hookable_layers
from ..recorder import Recorder
from .callback_session import Place, existing_and_free

# A training of no more steps than this is a probe, a search for a learning rate, an inner loop: it leaves no run beside others.
FEW = 10
# So many of them, and whatever is new waits until it is longer than that.
SOME = 2


class RecordedRun:
    """A run that one training was recorded to.

    Attributes:
        store: where.
        steps: of the training in this script up to its last end; those that it waited for included.
        last_step: the step up to which.
        is_kept: whether it is there still.
        left: how many optimizers it was removed of, if no other run has their parameters.
    """

    def __init__(self, store: Path, *, made_here: bool) -> None:
        self.store = store
        self.steps = self.last_step = self.left = 0
        self.is_kept = True
        self._made_here = made_here
        self._parameters: list[weakref.ref[Tensor]] = []
        self._optimizers: list[weakref.ref[Optimizer]] = []

    def hold(self, optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> None:
        """Remember what trains, and keep none of it alive."""
        self._optimizers, self._parameters = [*map(weakref.ref, optimizers)], [*map(weakref.ref, parameters)]

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those recorded last that are alive."""
        return [one for reference in self._optimizers if (one := reference()) is not None]

    def trains(self, ids: set[int]) -> bool:
        """Whether one of these parameters is its own."""
        return any((p := reference()) is not None and id(p) in ids for reference in self._parameters)

    def taken(self) -> None:
        """The script records to it by itself: it is not ours to remove."""
        self._made_here = False

    def is_short(self) -> bool:
        """Whether it may go."""
        return self.is_kept and self._made_here and self.steps <= FEW

    def remove(self) -> None:
        """Remove it."""
        shutil.rmtree(self.store, ignore_errors=True)
        self.is_kept, self.left = False, len(self._optimizers)


class RecordedRuns:
    """Gives every training of a script a run of its own.

    Attributes:
        current: the run that is being recorded to.
        nested: an optimizer that was let go of has stepped again: others come and go while a training goes on.
    """

    def __init__(self, store: Path) -> None:
        self.current: RecordedRun | None = None
        self.nested = False
        self._store = store
        self._runs: list[RecordedRun] = []
        self._removed = 0
        self._left = 0  # optimizers that waited, and for nothing
        self._waiting: weakref.WeakValueDictionary[int, Optimizer] = weakref.WeakValueDictionary()
        self._waited: dict[int, tuple[int, int]] = {}  # steps of each, and of the recorder as it came

    @property
    def kept(self) -> list[Path]:
        """Those that are there, in their order."""
        return list(dict.fromkeys(run.store for run in self._runs if run.is_kept))

    @property
    def passed_over(self) -> int:
        """Optimizers that took no more than `FEW` steps, and whose parameters are in no run."""
        return self._left + sum(run.left for run in self._runs)

    def of(self, ids: set[int]) -> RecordedRun | None:
        """The latest that trains one of these parameters."""
        return next((run for run in reversed(self._runs) if run.trains(ids)), None)

    def places(self, run: RecordedRun | None) -> list[Place]:
        """Where to record: `run`, if the training goes on in one, or else a path at which there is nothing.

        The script's first training, too, goes on in the run of an earlier one of the script, if its matrices are the same.
        """
        existing, free = existing_and_free(self._store)
        if run is not None and run.is_kept:
            return [(run.store, run.last_step), (free, 0)]
        return [*((path, None) for path in existing if not self.kept), (free, 0)]

    def begin(self, recorder: Recorder, places: Sequence[Place], optimizers: Sequence[Optimizer], parameters: Sequence[Tensor]) -> None:
        """A recorder has been attached at one of these places."""
        ids = {*map(id, parameters)}
        for other in self._runs:
            if other.trains(ids):
                other.left = 0
        run = next((one for one in self._runs if one.is_kept and one.store == recorder.store), None)
        if run is None:
            run = RecordedRun(recorder.store, made_here=recorder.store == places[-1][0].resolve())
        else:
            self._runs.remove(run)
        self._runs.append(run)  # the latest comes last
        run.last_step = recorder.first_step
        self.current = run
        run.steps += self.hold(optimizers, parameters)

    def hold(self, optimizers: Sequence[Optimizer], parameters: Iterable[Tensor]) -> int:
        """The present run is of these optimizers from now on; how many steps one of them had waited."""
        if self.current is not None:
            self.current.hold(optimizers, parameters)
        waited = 0
        for optimizer in optimizers:
            for one in (optimizer, *hookable_layers(optimizer)):
                if self._waiting.get(id(one)) is one:
                    del self._waiting[id(one)]
                    self._left -= 1
                    waited = max(waited, self._waited.pop(id(one))[0] - 1)
        return waited

    def let_go(self, recorder: Recorder | None) -> RecordedRun | None:
        """The recorder is going to be closed; what it recorded to."""
        run, self.current = self.current, None
        if run is not None and recorder is not None:
            run.steps += recorder.step - recorder.first_step
            run.last_step = recorder.step
            if not recorder.session.is_open:
                run.taken()
        return run

    def remove_short(self, but: RecordedRun | None) -> None:
        """Make way for what is worth more: remove those of a few steps."""
        for run in self._runs:
            if run is not but and run.is_short():
                run.remove()
                self._removed += 1

    def end(self) -> None:
        """Of runs of a few steps keep the last one, if there is nothing else."""
        kept = [run for run in self._runs if run.is_kept]
        if kept:
            self.remove_short(next((run for run in kept if not run.is_short()), kept[-1]))

    def waits(self, optimizer: Optimizer, run: RecordedRun | None, step: int) -> bool:
        """Whether an optimizer that is about to step is not to be recorded yet, as it may be one of those that take a few steps.

        Only once such ones were seen, and not where it belongs to a training that was longer than the present one. `step` is the recorder's.
        """
        if not self.nested and self._removed < SOME:
            return False
        if run is not None and (run is self.current or run.steps >= self._present(step)):
            return False
        is_known = self._waiting.get(id(optimizer)) is optimizer  # else the id is one of former days
        steps, since = self._waited[id(optimizer)] if is_known else (0, step)
        self._waiting[id(optimizer)] = optimizer
        self._waited[id(optimizer)] = steps + 1, since
        self._left += steps == 0
        return steps < FEW

    def took_turns(self, optimizer: Optimizer, step: int) -> bool:
        """Whether the recorder's optimizers, which are at `step`, went on while this one waited."""
        return self._waiting.get(id(optimizer)) is optimizer and self._waited[id(optimizer)][1] < step

    @property
    def waiting(self) -> list[Optimizer]:
        """Those that wait and are alive."""
        return list(self._waiting.values())

    def _present(self, step: int) -> int:
        return 0 if self.current is None else self.current.steps + step - self.current.last_step
