"""The closure that a step may be given: where there is one, gradients are born inside the step."""

from collections.abc import Callable
from typing import Any


def observed(see: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a step with a closure that calls `see` when it has made the gradients; None where the step has no closure."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None

    def run(*given: Any, **named: Any) -> Any:
        loss = closure(*given, **named)
        see()
        return loss

    return (args, {**kwargs, "closure": run}) if "closure" in kwargs else ((args[0], run, *args[2:]), kwargs)
