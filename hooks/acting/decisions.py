"""What a live schedule decided, and why: entries of plain values that the run keeps in its attribute `decisions`."""

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any, Literal, TypeAlias

from ...diagnostics.schedules.schedule_file import Schedule

Kind: TypeAlias = Literal["commit", "refresh", "keep", "advise"]
Decision: TypeAlias = dict[str, Any]


def decision(
    kind: Kind,
    step: int,
    why: str,
    *,
    optimizer: str,
    window: Iterable[int] | None = None,
    schedule: Schedule | None = None,
    **numbers: float | None,
) -> Decision:
    """One entry.

    Args:
        kind: "commit" (the first schedule came into force), "refresh" (another one did), "keep" (all stays), "advise" (one would have
            come into force, had that been asked for).
        step: after which it was made.
        why: the reason, in a sentence without its end.
        optimizer: label of the optimizer it is about.
        window: first and last step whose records it rests on.
        schedule: the one that it leads to; its steps per operator are kept, with what it predicts.
            `gain_interval` is that of its gain, as a share of the baseline's mean residual.
        numbers: what else it rests on; NaN is kept as None, as JSON has no NaN.
    """
    # What a schedule that is kept predicted was of another window.
    objective: Mapping[str, Any] = {} if schedule is None or kind == "keep" else schedule.objective
    said = {name: objective.get(name) for name in ("mean_residual", "baseline_mean_residual")}
    said["gain_interval"] = objective.get("choice", {}).get("relative_gain_interval")
    return {
        "step": step,
        "kind": kind,
        "optimizer": optimizer,
        "window": None if window is None else [int(end) for end in window],
        "steps": None if schedule is None else {operator: entry.steps for operator, entry in schedule.operators.items()},
        **{name: _plain(value) for name, value in {**said, **numbers}.items()},
        "why": why,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if value is None or not isfinite(value) else float(value)
