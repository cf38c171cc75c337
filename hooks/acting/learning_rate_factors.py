"""Multiplying the learning rates of parameter groups while their optimizer steps, and only then."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import isfinite
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..adapters import Reading, number, parameter_state
from ..observing.layers import steps_under_way
from ..observing.watched import Watched


class LearningRateFactors:
    """Factors of learning rates, in force from the beginning of a step to its end.

    Whoever reads or writes `group["lr"]` between steps, a scheduler above all, sees what it would see without; so does a recorder, whose
    hook comes first. Decoupled decay W(1 − ηλ) is divided by the factor, which leaves ηλ; decay that does not go with η stays.

    Attributes:
        of: factor by parameter, all those of a group having the same; a group may be split or moved.
        by_itself: whether a step has changed a learning rate: what sets it by itself is not multiplied.
    """

    def __init__(self, watched: Watched, guard: Callable[[], AbstractContextManager[None]]) -> None:
        """`guard` keeps exceptions of its block out of the training."""
        self.of: dict[Tensor, float] = {}
        self.by_itself = False
        self._watched, self._guard = watched, guard
        self._in_force: list[tuple[dict[str, Any], str, Any, Any]] = []  # during a step: group, setting, the user's value, ours
        inner: Optimizer = watched.optimizer
        self._handles = [inner.register_step_pre_hook(self._before_step), inner.register_step_post_hook(self._after_step)]
        # Ahead of the recorder's: what listens to its records may split groups, and is to find the user's learning rates in them.
        inner._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)  # type: ignore[attr-defined]

    def of_group(self, group: dict[str, Any]) -> float:
        """The factor of a group; 1 without one."""
        return next((self.of[p] for p in group["params"] if p in self.of), 1.0) if self.of else 1.0

    def set(self, group: dict[str, Any], factor: float) -> None:
        """Put a factor into force from the next step on; 1 for none."""
        for p in group["params"]:
            self.of.pop(p, None)
            if factor != 1:
                self.of[p] = factor

    def remove(self) -> None:
        """Let the optimizer step with the user's learning rates again."""
        self._put_back()
        self.of = {}
        for handle in self._handles:
            handle.remove()

    # A class whose `step` calls that of its base runs the hooks twice, the inner call within the outer.

    @_disable_dynamo
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.by_itself and steps_under_way([optimizer]) <= 1:
            with self._guard():
                self._put_back()  # of a step that an exception left
                for group in optimizer.param_groups:
                    factor = self.of_group(group)
                    decay = self._decay_of(group) if factor != 1 else None
                    self._multiply(group, "lr", factor)
                    if decay is not None:
                        self._multiply(group, decay, 1 / factor)

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._in_force and steps_under_way([optimizer]) <= 1:
            with self._guard():
                self._put_back()

    def _multiply(self, group: dict[str, Any], key: str, factor: float) -> None:
        own: Any = group.get(key)
        if factor != 1:
            group[key] = own * factor  # a new tensor where it is one
        self._in_force.append((group, key, own, group.get(key)))

    def _put_back(self) -> None:
        in_force, self._in_force = self._in_force, []
        for group, key, own, ours in in_force:
            now = group.get(key)
            if now is ours or (not isinstance(now, Tensor) and now == ours):
                if now is not own:
                    group[key] = own
            else:
                self.by_itself = True
        if self.by_itself:
            self.of = {}

    def _decay_of(self, group: dict[str, Any]) -> str | None:
        """The setting that is the λ of a decay W(1 − ηλ); None where decay is coupled, independent of η, not known, or none."""
        key = next((key for key in ("weight_decay", "wd") if number(group.get(key)) > 0), None)
        parameter = group["params"][0]
        reading = Reading(
            self._watched.optimizer, parameter, parameter.detach(), group, parameter_state(self._watched.optimizer, parameter)
        )
        if key is None or not isfinite(decoupled := self._watched.adapter(group).decoupled_decay(reading)):
            return None
        return key if decoupled == number(group[key]) else None
