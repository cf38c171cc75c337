"""Recording what a script trains, which knows nothing of it: from the first step of each optimizer that it makes."""

import logging
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import zarr
from torch import Tensor, nn
from torch.optim import Optimizer

from ...diagnostics.options import Options
from ..guard import KeptOut
from ..observing.layers import hookable_layers
from ..observing.left_out import left_out
from ..recording.second_session import yielding
from ..recording.stopwatch import Stopwatch
from .callback_session import CallbackSession
from .model_search import Several, live, owners, parameters_of
from .recorded_runs import FEW, RecordedRun, RecordedRuns
from .script_scalars import ScriptScalars

log = logging.getLogger("optiscope")

GRACE = 5.0  # seconds that beginnings may take however short the training: some ten of them, of a small model

NOTHING = "nothing was recorded"
TAKES_TURNS = "optiscope: %s takes turns with another optimizer of the same parameters; it is not recorded any more"
TOO_OFTEN = "optiscope: optimizers are made too often to record each of them; further ones, as this %s, are not recorded for now"


class ScriptRun:
    """Told of every step of every optimizer before it is taken, it attaches to those that are new.

    All optimizers that are alive at the first step are attached to at once; one that is made later, for the same model, is
    recorded with them. One that replaces another, of the same parameters, goes on in the same run. What a script has done with is let go of,
    and its memory with it. One that takes turns with what replaced it, over the same parameters, is recorded until then only.

    An optimizer of another model begins another training, which has a run of its own: `run-2.zarr` beside the first, or the next path at which there is
    nothing. No training goes on in the run of another one of the same script. Of the script's first training, what is at the path is continued, or one
    of those beside it, where the matrices are the same.

    Optimizers of a few steps (probes, a search for a learning rate, inner loops) leave no run, unless there is nothing else, and are counted. Once an optimizer
    that was let go of has stepped again, or some runs were so short, what is new waits for so many steps while the training under way stays recorded. One that
    steps by turns with it is then recorded together with it, in a run of both.

    What beginnings take is kept under `overhead` too, after a grace: a script that makes its optimizers anew every few steps has
    the first ones recorded, and then one from time to time.

    Attributes:
        outcome: what was recorded, in a clause; known after the end.
    """

    def __init__(self, store: str | Path, options: Options) -> None:
        """`store` and options as of :func:`optiscope.hooks.attach`."""
        self._session = CallbackSession(store, options)
        self._runs = RecordedRuns(self._session.store)
        self._scalars = ScriptScalars()
        self._optimizers: list[Optimizer] = []  # attached to
        self._layers: set[int] = set()  # ids of them, and of those that they wrap
        self._models: list[nn.Module] = []
        self._former: list[weakref.ref[Optimizer]] = []  # let go of
        # Not recorded, and not to be looked at again at every step; until there is another recording, or time for one.
        self._passed_over: weakref.WeakValueDictionary[int, Optimizer] = weakref.WeakValueDictionary()
        self._look_again = inf
        self._told: set[str] = set()
        self._overhead, self._budgeted = options.overhead, options.every is None
        self._started = time.perf_counter()
        self._beginnings = Stopwatch()
        self._records = 0.0  # seconds that recorders of before took
        self._process = os.getpid()
        self._ended = False
        self.outcome = NOTHING
        # Not by `atexit`: then the last records could not be written any more (see lifetime.py).
        threading._register_atexit(self.end)  # type: ignore[attr-defined]

    def log(self, scalars: Mapping[str, Any]) -> None:
        """Told of what the script gives to `optiscope.hooks.log`."""
        self._scalars.log(scalars)

    def take_over(self, numbers: Mapping[str, float]) -> None:
        """Told of numbers that the script gave to a logging library."""
        with KeptOut():
            self._scalars.take_over(numbers)

    def before_step(self, optimizer: Optimizer) -> None:
        """See to it that this optimizer is recorded, the step that it is about to take included."""
        if id(optimizer) in self._layers or self._ended or os.getpid() != self._process:
            return
        if time.perf_counter() >= self._look_again:
            self._passed_over.clear()
            self._look_again = inf
        if id(optimizer) in self._passed_over or not _has_matrix(optimizer):
            return
        if self._belongs(optimizer):
            self._join(optimizer)
        elif self._takes_turns(optimizer):
            self._pass_over(optimizer, TAKES_TURNS)
        elif self._runs.waits(optimizer, self._runs.of(_ids(optimizer)), self._step()):
            if not self._runs.nested:
                self._let_go()
        elif (debt := self._debt()) > max(GRACE, self._overhead * self._elapsed()):
            self._look_again = self._started + debt / self._overhead
            self._pass_over(optimizer, TOO_OFTEN)
            self._let_go()
        else:
            with self._beginnings:
                self._begin(optimizer)

    def end(self) -> None:
        """Detach, and commit what was recorded. Ending twice is harmless."""
        if not self._ended and os.getpid() == self._process:
            self._ended = True
            self._runs.let_go(self._session.recorder)
            self._session.end()
            try:
                self._runs.end()
                self.outcome = self._describe()
            except Exception as error:
                self.outcome = f"what was recorded could not be read back ({type(error).__name__}: {error})"

    def _describe(self) -> str:
        counts = [(store, _steps_of_records(store)) for store in self._runs.kept]
        told = [f"{store} holds {len(steps)} records, the last of step {steps[-1]}" for store, steps in counts if steps] or [NOTHING]
        if count := self._runs.passed_over:
            told.append(
                f"{count} short-lived optimizer{'s' * (count > 1)} (of at most {FEW} steps) {'were' if count > 1 else 'was'} passed over"
            )
        return "; ".join(told)

    def _belongs(self, optimizer: Optimizer) -> bool:
        """Whether it is one more optimizer of what is being recorded: same model, other parameters."""
        ours = _ids(optimizer)
        return self._is_apart(ours) and ours <= {id(p) for model in self._models for p in parameters_of(model)}

    def _is_apart(self, ids: set[int]) -> bool:
        return all(ids.isdisjoint(_ids(one)) for one in self._optimizers)

    def _join(self, optimizer: Optimizer) -> None:
        recorder = self._session.recorder
        if recorder is not None and recorder.session.is_open:
            # Met inside its first step, as a rule after the others have taken theirs of the same iteration.
            recorder.watch(optimizer, steps=max(recorder.step - 1, 0))
        self._keep([*self._optimizers, optimizer])
        self._runs.hold(self._optimizers, [p for one in self._optimizers for p in _parameters(one)])

    def _step(self) -> int:
        return self._session.recorder.step if self._session.recorder is not None else 0

    def _takes_turns(self, optimizer: Optimizer) -> bool:
        """Whether it, or what wraps it, was replaced by one that is being recorded, and yet steps again."""
        let_go = (layer for reference in self._former if (one := reference()) is not None for layer in (one, *hookable_layers(one)))
        return any(layer is optimizer for layer in let_go) and not self._is_apart(_ids(optimizer))

    def _debt(self) -> float:
        """Seconds that beginnings took, and records beyond their share: each recording begins with one, paid for or not."""
        recorder = self._session.recorder
        records = self._records + (recorder.overhead_seconds if recorder is not None else 0)
        return self._beginnings.wall + (max(records - self._overhead * self._elapsed(), 0) if self._budgeted else 0)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def _pass_over(self, optimizer: Optimizer, told: str) -> None:
        self._passed_over[id(optimizer)] = optimizer
        if told not in self._told:
            self._told.add(told)
            log.warning(told, type(optimizer).__name__)

    def _let_go(self) -> RecordedRun | None:
        """Hold nothing of what may be over: a model that follows it may need its memory. Where it was recorded."""
        recorder = self._session.recorder
        run = self._runs.let_go(recorder)
        self._scalars.let_go()
        self._session.let_go()
        self._records += recorder.overhead_seconds if recorder is not None else 0
        self._former = [*map(weakref.ref, self._optimizers), *self._former]
        self._models = []
        self._optimizers, self._layers = [], set()
        return run

    def _begin(self, optimizer: Optimizer) -> None:
        took_turns = self._runs.took_turns(optimizer, self._step())  # with what is recorded: then both are one training
        before = self._let_go()
        run: RecordedRun | None = self._runs.of(_ids(optimizer))  # in which it goes on
        former = [one for reference in self._former if (one := reference()) is not None]
        aside = [*former, *self._runs.waiting]  # recorded only with a model that they train a part of
        new = [one for one in live(Optimizer) if all(one is not other for other in aside)]
        kept: list[Optimizer] = []
        if any(one is optimizer for one in former) and run is not None and run is not before:
            self._runs.nested = True  # it was let go of too early
            took_turns = before is not None and before.steps <= 1  # one that is nested in it takes several
            new, kept = new if took_turns else [], run.optimizers
        if took_turns and before is not None:
            run, kept = None, [*kept, *before.optimizers]  # whose names are others together
        self._models = owners(p for one in (optimizer, *new, *kept) for p in _parameters(one))
        position = {id(p): i for i, p in enumerate(p for model in self._models for p in parameters_of(model))}
        # In an order that does not depend on chance, for that is how those of one class are numbered.
        new.sort(key=lambda one: min((position.get(i, len(position)) for i in _ids(one)), default=len(position)))
        kept += [one for one in aside if _ids(one) <= position.keys()]
        optimizers = _disjoint(optimizer, [*sorted(new, key=lambda one: -len(hookable_layers(one))), *kept])
        self._former = [weakref.ref(one) for one in former if all(one is not other for other in optimizers)]
        self._keep(optimizers)
        unnamed = [p for one in optimizers for group in one.param_groups for p in group["params"] if p.ndim >= 2 and id(p) not in position]
        if unnamed:
            log.warning(
                "optiscope: no module was found that holds %d of the matrices of %s; these are named by optimizer and group",
                len(unnamed),
                ", ".join(type(one).__name__ for one in optimizers),
            )
        model = Several(self._models) if len(self._models) > 1 else next(iter(self._models), None)
        self._runs.remove_short(run)
        places = self._runs.places(run)
        self._session.begin(optimizers, model, 0, places)
        if self._session.recorder is not None:
            yielding.add(self._session.recorder.session)
            self._runs.begin(self._session.recorder, places, optimizers, [p for one in optimizers for p in _parameters(one)])
            self._scalars.begin(self._session.recorder)

    def _keep(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers
        self._passed_over.clear()
        self._layers = {id(layer) for one in optimizers for layer in (one, *hookable_layers(one))}


def _disjoint(first: Optimizer, others: Sequence[Optimizer]) -> list[Optimizer]:
    """Those that share no parameter with one before: a wrapper without what it wraps, a replacement without what it replaced."""
    chosen, claimed = [first], _ids(first)
    for one in others:
        ids = _ids(one)
        if ids and claimed.isdisjoint(ids):
            chosen.append(one)
            claimed |= ids
    return chosen


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for p in _parameters(optimizer)}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """Of any that is alive: one that is still being made has no groups yet, and one that is no business of ours may raise."""
    try:
        return [p for group in optimizer.param_groups for p in group["params"]]
    except Exception:
        return []


def _has_matrix(optimizer: Optimizer) -> bool:
    return any(p.ndim >= 2 and p.numel() and left_out(p) is None for group in optimizer.param_groups for p in group["params"])


def _steps_of_records(store: Path) -> list[int]:
    """Steps of the committed records."""
    steps = zarr.open_group(store, mode="r")["update/step"]
    assert isinstance(steps, zarr.Array)
    return [int(step) for step in steps[:]]  # type: ignore[union-attr]
