"""An optimizer and what it wraps, and which of their steps is under way."""

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch.optim import Optimizer

from ..guard import KeptOut

# Where wrappers (Lookahead, SAM, Accelerate, ZeRO) keep the optimizer they wrap.
_INNER = ("optimizer", "base_optimizer", "_base_optimizer", "_optimizer", "optim")


# The function that torch wraps around every `step` to run its hooks; all share its code.
_STEP_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__


def steps_under_way(layers: Sequence[Optimizer]) -> int:
    """How many calls of these optimizers' `step` the caller is within: the only witness of one that an exception has left."""
    count = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _STEP_WRAPPER and any(frame.f_locals["args"][0] is layer for layer in layers):
            count += 1
        frame = frame.f_back
    return count


def hookable_layers(optimizer: Any) -> list[Optimizer]:
    """The optimizer and those it wraps that run step hooks, outermost first.

    Known by what they have, not by their class: some libraries do not derive from torch's, and Accelerate's wrapper derives
    from it without running hooks.
    """
    layers: list[Any] = []
    seen: list[Any] = []
    while optimizer is not None and all(optimizer is not one for one in seen):
        seen.append(optimizer)
        hooks = _attribute(optimizer, "_optimizer_step_pre_hooks")
        if hooks is not None and _attribute(optimizer, "param_groups") is not None:
            # A wrapper that hands attributes through, or copies them (Lightning's), shows the hooks of what it wraps.
            layers = [one for one in layers if one._optimizer_step_pre_hooks is not hooks] + [optimizer]
        inner = (_attribute(optimizer, name) for name in _INNER)
        optimizer = next((found for found in inner if _attribute(found, "param_groups") is not None), None)
    return layers


def _attribute(thing: Any, name: str) -> Any:
    """An attribute of somebody's object; None where it has none, or a property of that name fails."""
    with KeptOut():
        return getattr(thing, name, None)
    return None
