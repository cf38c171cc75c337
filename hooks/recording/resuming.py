"""How many steps a training had taken when it is attached to again, as far as its optimizers' own state tells."""

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from torch import Tensor

from ..guard import KeptOut
from ..observing.watched import Watched


def own_steps(watched: Watched) -> int:
    """The steps that an optimizer's own state counts (Adam's does, from a checkpoint too); 0 where it counts none."""
    optimizer = watched.optimizer
    with KeptOut():  # a property of somebody's class
        states = optimizer.state.values() if isinstance(optimizer.state, Mapping) else ()
        return max((_number(held.get("step")) for held in (*states, *optimizer.param_groups) if isinstance(held, Mapping)), default=0)
    return 0


def _number(value: Any) -> int:
    if type(value) is Tensor and value.numel() == 1 and value.device.type != "meta":
        value = value.item()
    return int(value) if type(value) in (int, float) and isfinite(value) and value > 0 else 0


def steps_taken(attributes: Mapping[str, Any], now: Mapping[str, int]) -> int | None:
    """Steps of a run's training that were taken by optimizers which count `now` own steps, by label.

    The run says what they counted when it was last attached to, and which step that was. An optimizer that is new counts none and tells nothing:
    a training that begins anew is no restart.

    Returns:
        None where that is not known.

    >>> run = {"optimizers": [{"label": "AdamW", "own_steps": 10}], "continued": [{"first_step": 100, "optimizers": [{"label": "AdamW", "own_steps": 0}]}]}
    >>> steps_taken(run, {"AdamW": 50}), steps_taken(run, {"AdamW": 0}), steps_taken(run, {"Muon": 50})
    (150, None, None)
    """
    last: Mapping[str, Any] = next(iter(attributes.get("continued", [])[-1:]), {"first_step": 0, **attributes})
    described: Iterable[Mapping[str, Any]] = last.get("optimizers", [])
    known = [
        last["first_step"] + now[one["label"]] - one["own_steps"]
        for one in described
        if now.get(one.get("label", "")) and "own_steps" in one
    ]
    return max((steps for steps in known if steps > 0), default=None)
