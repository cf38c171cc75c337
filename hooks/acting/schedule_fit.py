"""Whether a schedule fits where it is to be put into force: shapes of the matrices it was derived from, and steps that the optimizer can run."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from ...diagnostics.escape import escaped, shortened
from ...diagnostics.schedules.schedule_file import Schedule
from ..adapters import Group, adapter_for, class_name
from ..adapters.own_coefficients import own_coefficients
from .schedule_fields import ScheduleFields

log = logging.getLogger("optiscope")

# Groups that get a schedule, each with its operator and how it takes one.
Scheduled: TypeAlias = Sequence[tuple[Group, str, ScheduleFields]]
Shape: TypeAlias = tuple[int, int]

_NAMED = 3  # operators that a message spells out


def check_fit(optimizer: Optimizer, schedule: Schedule, scheduled: Scheduled, *, force: bool) -> None:
    """Refuse a schedule of other shapes, or of more steps than the optimizer's own coefficients give it; with `force` only warn.

    Raises:
        ValueError: it does not fit.
    """
    for misfit in (_other_shapes(optimizer, schedule, scheduled), _more_steps(optimizer, schedule, scheduled)):
        if misfit is None:
            continue
        what, advice = misfit
        if not force:
            raise ValueError(f"schedule: {what}; {advice}")
        log.warning("optiscope: forced: %s.", what)


def _other_shapes(optimizer: Optimizer, schedule: Schedule, scheduled: Scheduled) -> tuple[str, str] | None:
    """Which operators' matrices have shapes that the schedule was not derived from, and what to do.

    A spectrum is the same read across or down: (m, n) and (n, m) are alike. How many layers there are does not matter.
    """
    here: dict[str, list[set[Shape]]] = {}
    for group, operator, _ in scheduled:
        here.setdefault(operator, []).extend(_shapes(optimizer, group))
    there = {operator: {_alike(shape) for shape in schedule.operators[operator].shapes} for operator in here}
    if unknown := [operator for operator, shapes in there.items() if not shapes]:
        log.info(
            "optiscope: the schedule does not say what shapes the matrices of %s had that it was derived from, so that nothing was compared with "
            "this model's; one that `diag schedule` derives now does.", _listed(unknown),
        )  # fmt: skip
    other = {
        operator: {min(possible) for possible in here[operator] if there[operator].isdisjoint(possible)}
        for operator in here
        if there[operator]
    }
    differ = [f"{operator} {_spelled(there[operator])}, here {_spelled(found)}" for operator, found in other.items() if found]
    if not differ:
        return None
    what = f"it was derived from matrices of other shapes ({_listed(differ, '; ')}) of {_origin(schedule.provenance)}, so its steps need not suit these"
    return what, "derive one with `diag schedule` from a run of this model, or pass force=True"


def _shapes(optimizer: Optimizer, group: Group) -> Iterator[set[Shape]]:
    """For every matrix that a group orthogonalises the shapes under which it may be recorded."""
    adapter = adapter_for(optimizer, group)
    stacks = [] if adapter is None or adapter.stacks is None else [stack for stack in adapter.stacks(group) if len(stack) > 1]
    stacked = {id(p) for stack in stacks for p in stack}
    for stack in stacks:  # side by side
        yield {_alike((stack[0].shape[0], sum(p.numel() for p in stack) // stack[0].shape[0]))}
    yield from (_shapes_of(p) for p in group["params"] if id(p) not in stacked)


def _shapes_of(p: Tensor) -> set[Shape]:
    """As one matrix, (first, product of the rest); three dimensions also as a stack of matrices."""
    whole = _alike((p.shape[0], p.numel() // max(p.shape[0], 1)))
    return {whole, _alike((p.shape[1], p.shape[2]))} if p.ndim == 3 else {whole}


def _alike(shape: Shape) -> Shape:
    return min(shape), max(shape)


def _origin(provenance: Mapping[str, object]) -> str:
    """The run that a schedule came from, in words; its texts are a file's."""
    run, created = provenance.get("run"), provenance.get("run_created")
    if run is None:
        return "a run that it does not name"
    return shortened(escaped(f"the run {run}" + ("" if created is None else f" (begun {created})")))


def _more_steps(optimizer: Optimizer, schedule: Schedule, scheduled: Scheduled) -> tuple[str, str] | None:
    """Which operators have more steps than the optimizer would run, and what to do; a warning where that cannot be known."""
    name = class_name(type(optimizer))
    too_many: dict[str, list[str]] = {}
    doubtful: dict[str, str] = {}
    for group, operator, fields in scheduled:
        if fields.coefficients is not None:
            continue  # it gets as many coefficients as steps
        steps, own = schedule.operators[operator].steps, own_coefficients(optimizer, group)
        lists = [f"{where}: {count}" for where, count in own.lists]
        if own.most is not None and steps > own.most:
            where = next(where for where, count in own.lists if count == own.most)
            ends = f"{name} would run {own.most} steps, as many as {where} holds coefficients for"
            too_many.setdefault(ends, []).append(f"{operator} {steps}")
        elif steps > own.surely:
            doubtful[f"{operator} {steps}"] = _listed(lists) or "no coefficients were found"
    if doubtful:
        log.warning(
            "optiscope: whether %s runs as many steps as it is now told to (%s) could not be read from its source (%s): it may stop at the end of a list. "
            "Compare the residuals that are recorded as achieved with those at other step counts.",
            name, _listed(list(doubtful)), _listed(list(dict.fromkeys(doubtful.values())), "; "),
        )  # fmt: skip
    if not too_many:
        return None
    return "; ".join(f"{ends}, and it has more ({_listed(list(dict.fromkeys(more)))})" for ends, more in too_many.items()), (
        "derive one under a smaller budget, use an optimizer that takes coefficients, or pass force=True if this one repeats the last of its own"
    )


def _spelled(shapes: Iterable[Shape]) -> str:
    return ", ".join(f"{m} × {n}" for m, n in sorted(shapes))


def _listed(parts: Sequence[str], separator: str = ", ") -> str:
    """The first of them, and how many more there are."""
    more = len(parts) - _NAMED
    return separator.join(parts[:_NAMED]) + (f"{separator}and {more} more" if more > 0 else "")
