"""Recording what a script trains, which knows nothing of it: from the first step of each optimizer that it makes."""

import logging
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import zarr
from torch import nn
from torch.optim import Optimizer

from ..diagnostics.catalogue import GROUPS
from .callback_session import CallbackSession
from .model_search import Several, live, owners, parameters_of
from .watched import hookable_layers

log = logging.getLogger("optiscope")


class ScriptRun:
    """Told of every step of every optimizer before it is taken, it attaches to those that are new.

    All optimizers that are alive at the first step are attached to at once; one that is made later, for the same model, is
    recorded with them. One that replaces another, or that belongs to another model, begins a new recording, which goes on
    behind the first one, or in `run-2.zarr` beside it where the matrices are others: what a script has done with is let go of,
    and its memory with it. Should an optimizer that was let go of step again, all are recorded together.

    Attributes:
        outcome: what was recorded, in a clause; known after the end.
    """

    def __init__(self, store: str | Path, *, every: int | None, overhead: float) -> None:
        """Options as of :func:`optiscope.hooks.attach`.

        Raises:
            ValueError: an `every` or `overhead` out of range.
        """
        self._session = CallbackSession(store, every=every, overhead=overhead, measure=GROUPS, operators=None, on_error="warn")
        self._optimizers: list[Optimizer] = []  # attached to
        self._layers: set[int] = set()  # ids of them, and of those that they wrap
        self._models: list[nn.Module] = []
        self._former: list[weakref.ref[Optimizer]] = []  # let go of
        self._stores: dict[Path, None] = {}
        self._process = os.getpid()
        self._ended = False
        self.outcome = "nothing was recorded"
        # Not by `atexit`: then the last records could not be written any more (see lifetime.py).
        threading._register_atexit(self.end)  # type: ignore[attr-defined]

    def before_step(self, optimizer: Optimizer) -> None:
        """See to it that this optimizer is recorded, the step that it is about to take included."""
        if id(optimizer) in self._layers or self._ended or os.getpid() != self._process or not _has_matrix(optimizer):
            return
        if not self._belongs(optimizer):
            self._begin(optimizer)
            return
        if self._session.recorder is not None:
            # Met inside its first step, as a rule after the others have taken theirs of the same iteration.
            self._session.recorder.watch(optimizer, steps=max(self._session.recorder.step - 1, 0))
        self._keep([*self._optimizers, optimizer])

    def end(self) -> None:
        """Detach, and commit what was recorded. Ending twice is harmless."""
        if not self._ended and os.getpid() == self._process:
            self._ended = True
            self._session.end()
            try:
                self.outcome = self._describe()
            except Exception as error:
                self.outcome = f"what was recorded could not be read back ({type(error).__name__}: {error})"

    def _describe(self) -> str:
        counts = [(store, _steps_of_records(store)) for store in self._stores]
        told = [f"{store} holds {len(steps)} records, the last of step {steps[-1]}" for store, steps in counts if steps]
        return "; ".join(told) or self.outcome

    def _belongs(self, optimizer: Optimizer) -> bool:
        """Whether it is one more optimizer of what is being recorded: same model, other parameters."""
        ours, of_models = _ids(optimizer), {id(p) for model in self._models for p in parameters_of(model)}
        return ours <= of_models and all(ours.isdisjoint(_ids(one)) for one in self._optimizers)

    def _begin(self, optimizer: Optimizer) -> None:
        former = [*self._optimizers, *(one for reference in self._former if (one := reference()) is not None)]
        if any(one is optimizer for one in former):
            former = []  # it was let go of too early, and so may the others have been
        new = [one for one in live(Optimizer) if all(one is not other for other in former)]
        self._models = owners(p for one in (optimizer, *new) for group in getattr(one, "param_groups", ()) for p in group["params"])
        position = {id(p): i for i, p in enumerate(p for model in self._models for p in parameters_of(model))}
        # In an order that does not depend on chance, for that is how those of one class are numbered.
        new.sort(key=lambda one: min((position.get(i, len(position)) for i in _ids(one)), default=len(position)))
        kept = [one for one in former if _ids(one) <= position.keys()]
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
        self._session.begin(optimizers, model, 0)
        if self._session.recorder is not None:
            self._stores[self._session.recorder.store] = None

    def _keep(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers
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
    # One that is still being made has no groups yet.
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def _has_matrix(optimizer: Optimizer) -> bool:
    return any(p.ndim >= 2 and p.is_floating_point() and p.numel() for group in optimizer.param_groups for p in group["params"])


def _steps_of_records(store: Path) -> list[int]:
    """Steps of the committed records."""
    steps = zarr.open_group(store, mode="r")["update/step"]
    assert isinstance(steps, zarr.Array)
    return [int(step) for step in steps[:]]  # type: ignore[union-attr]
