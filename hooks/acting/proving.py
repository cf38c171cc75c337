"""Which fields of a group steer its iteration, and whether it follows a schedule: seen by watching steps of a copy under other settings."""

import logging
from collections.abc import Callable, Iterator, Sequence
from math import isclose
from typing import Any

import torch
from torch import Tensor

from ...diagnostics.newton_schulz.families import Coefficients
from ...diagnostics.schedules.schedule_file import Schedule
from ..adapters import Group, class_name
from ..guard import KeptOut
from ..watching.watched_step import WatchedStep, watch_step
from .schedule_fields import ScheduleFields
from .schedule_fit import Scheduled

log = logging.getLogger("optiscope")

_TRIAL = ((3.0, -3.2, 1.2), (2.5, -2.2, 0.7))  # coefficients that no library brings
_LEAST_SIDE = 5  # of a matrix whose iteration can be told
_LR = 0.01
_WITHIN = 0.02  # relative distance of coefficients that are the same: bfloat16


def fields_by_watching(optimizer: Any, group: Group) -> ScheduleFields | None:
    """The fields that hold steps and coefficients of a group's iteration, found by changing each in a copy; None where none does.

    A number is tried that is what a watched step ran, and a list that holds its coefficients.
    """
    ran = iteration_of(optimizer, group)
    if not ran:
        return None
    counts = list(_holding(group, lambda value: type(value) is int and value == len(ran)))
    steps = next((key for key in counts if _steers(optimizer, group, key, len(ran))), None)
    lists = _holding(group, lambda value: _alike(value, ran[: len(value)] if isinstance(value, (list, tuple)) else ()))
    for key in lists:
        # One step more than its list is long fails: such a number can only be told together with the list.
        for with_steps in dict.fromkeys((steps, None, *counts)):
            fields = ScheduleFields(key, steps=with_steps)
            if _same(iteration_of(optimizer, _under(group, fields, _TRIAL)), _TRIAL):
                return fields
    return None if steps is None else ScheduleFields(None, steps=steps)


def _holding(group: Group, is_one: Callable[[Any], bool]) -> Iterator[str]:
    for key, value in group.items():
        if key != "params" and is_one(value):
            yield key


def _steers(optimizer: Any, group: Group, key: str, steps: int) -> bool:
    other = steps - 1 if steps > 1 else steps + 1
    return len(iteration_of(optimizer, {**group, key: other})) == other


def _alike(value: Any, ran: Coefficients) -> bool:
    whole = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, (list, tuple)) and len(one) == 3 for one in value)
    return whole and _same(tuple(tuple(map(float, one)) for one in value), ran)


def _same(found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> bool:
    return len(found) == len(wanted) and all(
        isclose(x, y, rel_tol=_WITHIN, abs_tol=1e-3)
        for one, other in zip(found, wanted, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def _under(group: Group, fields: ScheduleFields, coefficients: Coefficients) -> dict[str, Any]:
    settings = dict(group)
    fields.write(settings, coefficients)
    return settings


def iteration_of(optimizer: Any, group: Group) -> Coefficients:
    """The triples that a step of a copy runs on a matrix of a group under its settings; none where none is found."""
    return next(iter(_watched(optimizer, group).values()), ())


def orthogonalises(optimizer: Any, group: Group) -> bool | None:
    """Whether an iteration moves matrices of a group in a step of a copy; None where no copy could be stepped, or its step moved nothing.

    Of matrices with a side under 5 no iteration can be told: a group of none else orthogonalises nothing.
    """
    if not (some := _tells(group)):
        return False
    if (seen := _step_of(optimizer, group, some)) is None:
        return None
    moved = any(not torch.equal(seen.twin.parameters[id(p)], p) for p in some)
    return bool(seen.matches) or (False if moved else None)


def _watched(optimizer: Any, group: Group) -> dict[int, Coefficients]:
    """What :func:`iteration_of` gives for each of the matrices that are watched, by their `id`."""
    some = _tells(group)
    seen = _step_of(optimizer, group, some) if some else None
    return {m.piece.parameter: tuple(m.chain.triples) for m in seen.matches} if seen else {}


def _tells(group: Group) -> list[Tensor]:
    """The matrices that are watched: all of a group whose state may be stacked, else the smallest that tells."""
    matrices = [p for p in group["params"] if p.ndim >= 2 and min(p.shape[-2:]) >= _LEAST_SIDE]
    if len(matrices) > 1 and all(p.shape == matrices[0].shape for p in group["params"]):
        return matrices
    return sorted(matrices, key=Tensor.numel)[:1]


def _step_of(optimizer: Any, group: Group, some: Sequence[Tensor]) -> WatchedStep | None:
    """A step of a copy with gradients that are made up, from a generator of its own, and a learning rate too, which may still be 0; None where it failed."""
    generator = torch.Generator().manual_seed(0)
    gradients = {id(p): torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in some}
    settings = {**group, **({"lr": _LR} if "lr" in group else {})}
    seen = None
    with KeptOut(lambda error: log.debug("optiscope: a copy of %s could not be stepped: %s", class_name(type(optimizer)), error)):
        seen = watch_step(optimizer, settings, some, gradients=gradients)
    return seen


def prove(optimizer: Any, schedule: Schedule, scheduled: Scheduled, *, force: bool) -> None:
    """Refuse a schedule that a copy of the optimizer, set to it, does not follow; with `force` only warn. What cannot be watched is not refused.

    Raises:
        ValueError: a step of the copy ran another number of steps, or other coefficients where there is a field for them.
    """
    for group, operator, fields in scheduled:
        wanted = schedule.operators[operator].coefficients
        for ran in dict.fromkeys(_watched(optimizer, _under(group, fields, wanted)).values()):
            if len(ran) == len(wanted) and (fields.coefficients is None or _same(ran, wanted)):
                continue
            what = f"{len(ran)} steps" if len(ran) != len(wanted) else f"other coefficients (the first: {_spelled(ran)})"
            text = (
                f"{class_name(type(optimizer))} does not follow it: a copy that was set to the {len(wanted)} steps of {operator} ran {what}"
            )
            if not force:
                raise ValueError(f"schedule: {text}; nothing was changed. Use torch.optim.Muon, or pass force=True")
            log.warning("optiscope: forced: %s.", text)


def _spelled(ran: Sequence[Sequence[float]]) -> str:
    return ", ".join(f"{value:.4g}" for value in ran[0])
