"""Putting a schedule into force on a Muon: steps, and coefficients of every step, per operator."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...diagnostics.operators import OperatorRule, classify, clean_name
from ...diagnostics.schedules.schedule_file import Schedule
from ..adapters import Group, class_name, row_of
from ..observing.layers import hookable_layers
from .group_splitting import extend_schedulers, owned_by_place, schedulers_of, split_by_operator
from .proving import fields_by_watching, prove
from .schedule_fields import ScheduleFields, fields_of, gram_form_warning, runs_newton_schulz, why_not
from .schedule_fit import Scheduled, check_fit
from .shared_state import check_splittable, look_after_next_step

log = logging.getLogger("optiscope")

# What puts the schedule of an optimizer back after `load_state_dict`; a new schedule takes the place of the old one.
_reload_hooks: WeakKeyDictionary[Any, RemovableHandle] = WeakKeyDictionary()


def apply_schedule(
    optimizer: Any,
    schedule: Schedule,
    model: nn.Module,
    *,
    lr_schedulers: Iterable[Any] = (),
    operators: OperatorRule | None = None,
    force: bool = False,
) -> dict[str, int]:
    """Give every matrix of `optimizer` the Newton–Schulz steps and coefficients that `schedule` holds for its operator.

    Works on every Muon whose parameter groups hold `ns_steps`: torch.optim.Muon, the Muon family of pytorch_optimizer, timm's
    Muon. Of a class that is not in the adapter table the fields are found by watching steps of a copy under other settings, and a
    schedule that the copy does not follow is refused before anything is changed. Groups are split by operator, in place and in order; state, learning rates and every other setting stay as they are, so
    that a schedule equal to the present settings changes nothing, to the bit (but where an optimizer batches the matrices of a
    group on an accelerator whose kernels round by the size of the batch). Each group then holds `operator`, `ns_steps` and, as a
    list with one (a, b, c) per step, its coefficients; timm's `safety_factor`, by which they would act on other values than
    σ/‖M‖_F, becomes 1. Groups that run AdamW are not touched.

    Where the groups have no field for a list of coefficients (Moonlight, MARS-M), the steps alone are put into force, and a
    warning says so; more steps than the optimizer's own list of coefficients is long are refused. torch.optim.Muon itself takes one triple for all steps. Its Newton–Schulz function is therefore replaced,
    once per process, by one that understands a list of triples and hands everything else to torch's own: optimizers without a
    schedule are not affected.

    To resume from a checkpoint written under the schedule: build the optimizer, apply the schedule, build the learning-rate
    scheduler, load. From one written before it: build, load, then apply and pass the scheduler. Steps and coefficients that a
    checkpoint brings are put back to the schedule's. A copy made by deepcopy or pickle keeps the settings, but not this: apply
    the schedule to it again.

    Args:
        optimizer: the optimizer, or a wrapper (Accelerate, Lookahead, SAM) around it; the innermost one gets the schedule.
        schedule: as from `Schedule.load`.
        model: where parameter names come from. A matrix belongs to the operator that lists its name; else to the
            operator of its classified name (the half of it that its layer lies in, where the schedule cuts it by depth); where the
            schedule has neither, its settings stay.
        lr_schedulers: learning-rate schedulers already built on `optimizer`; their per-group lists are extended to the
            new groups. Not needed for those built afterwards.
        operators: your own naming, as in `attach`.
        force: put the schedule into force where it was derived from matrices of other shapes, or has more steps than the optimizer brings
            coefficients for, with a warning instead of an error. (m, n) and (n, m) count as one shape.

    Returns:
        Number of matrices per operator that got a schedule.

    Raises:
        TypeError: no group of the optimizer holds `ns_steps` or another field that steers its iteration, or a wrapper keeps parameter groups of its own.
        ValueError: no matrix of the optimizer is in the schedule, an operator has no step, a scheduler exists that was not
            passed, a stack of matrices is of several operators, ranks would lose the momenta they own, a group that would be split keeps
            something of several matrices together; and without `force`, shapes or steps that do not fit, or a copy of an unknown class that
            does not follow the schedule.
        RuntimeError: this version of torch does not run the function that would be replaced.
    """
    layers = layers_of(optimizer)
    check_takes_a_schedule(layers[-1])
    outer, inner = (optimizer, *layers[:-1]), layers[-1]
    if empty := [name for name, entry in schedule.operators.items() if not entry.coefficients]:
        raise ValueError(f"schedule: {', '.join(empty)}: expected at least one Newton–Schulz step, got none")

    fields_of_group = {id(group): fields for group in inner.param_groups if (fields := _fields(inner, group)) is not None}
    split = split_by_operator(inner, _operator_of(schedule, model, operators), lambda group: id(group) in fields_of_group)
    groups = [part for parts in split for part in parts]
    # What each group gets: its operator and how it takes a schedule; None for those that run no Newton–Schulz steps.
    whole = [group for group, parts in zip(inner.param_groups, split, strict=True) for _ in parts]
    shares = [
        (part["operator"], fields_of_group[id(group)]) if id(group) in fields_of_group else None
        for part, group in zip(groups, whole, strict=True)
    ]
    scheduled = [(group, *share) for group, share in zip(groups, shares, strict=True) if share is not None and share[0] is not None]
    if not scheduled:
        raise ValueError(
            f"schedule: none of the optimizer's matrices is one of its operators ({', '.join(schedule.operators)}); pass the model they were recorded from"
        )
    schedulers: list[Any] = []
    for group, parts in zip(inner.param_groups, split, strict=True):
        if len(parts) > 1:
            check_splittable(inner, group)
    if max(map(len, split)) > 1:
        if owned_by_place(inner):
            raise ValueError(
                f"optimizer: the ranks of {class_name(type(inner))} own momenta by place in a parameter group, which a split changes; "
                "apply the schedule before the first step"
            )
        schedulers = schedulers_of((*outer, inner), lr_schedulers)
    check_fit(inner, schedule, scheduled, force=force)
    if row_of(inner) is None:
        prove(inner, schedule, scheduled, force=force)
    for _, _, fields in scheduled:
        fields.prepare()  # may refuse; nothing has been changed, and nothing refuses after it
    _warn(inner, schedule, scheduled)

    extend_schedulers(schedulers, [len(parts) for parts in split])
    inner.param_groups[:] = groups
    look_after_next_step(inner, split)
    put_into_force = _putting_into_force(schedule, shares)
    put_into_force(inner)
    for layer in layers:  # SAM loads by itself and hands the groups to the optimizer it wraps
        if (previous := _reload_hooks.pop(layer, None)) is not None:
            previous.remove()
        if hasattr(layer, "_optimizer_load_state_dict_post_hooks"):
            _reload_hooks[layer] = layer.register_load_state_dict_post_hook(put_into_force)
    counts: dict[str, int] = {}
    for group, operator, _ in scheduled:
        counts[operator] = counts.get(operator, 0) + len(group["params"])
    return counts


def layers_of(optimizer: Any) -> list[Optimizer]:
    """The optimizer and those it wraps, outermost first; the last one gets the schedule.

    Raises:
        TypeError: it is no optimizer, or a wrapper keeps parameter groups of its own.
    """
    if not (layers := hookable_layers(optimizer)):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    inner = layers[-1]
    for wrapper in (optimizer, *layers[:-1]):
        if wrapper.param_groups is not inner.param_groups:
            raise TypeError(
                f"optimizer: {class_name(type(wrapper))} keeps parameter groups of its own beside those of {class_name(type(inner))}; "
                "apply the schedule before wrapping the optimizer"
            )
    return layers


def check_takes_a_schedule(optimizer: Optimizer) -> None:
    """Raise TypeError where no group holds `ns_steps`, or another field that steers its iteration."""
    if not any(_fields(optimizer, group) for group in optimizer.param_groups):
        raise TypeError(why_not(optimizer))


def _fields(optimizer: Optimizer, group: Group) -> ScheduleFields | None:
    """How a group takes a schedule: by the fields that are known; of a class that is in no table, where they take no coefficients, by those that steer a copy of it."""
    known = fields_of(optimizer, group) if runs_newton_schulz(group) else None
    if row_of(optimizer) is not None or (known is not None and known.coefficients is not None):
        return known
    return fields_by_watching(optimizer, group) or known


def _putting_into_force(schedule: Schedule, shares: Sequence[tuple[str | None, ScheduleFields] | None]) -> Callable[[Any], None]:
    """What writes the schedule into an optimizer's groups, now and after a checkpoint has overwritten them."""

    def put_into_force(target: Any) -> None:
        # By position: the groups of a checkpoint from before the schedule hold no operator.
        for group, share in zip(target.param_groups, shares, strict=False):
            if share is None:
                continue
            operator, fields = share
            if group.setdefault("operator", operator) != operator:
                raise ValueError(
                    f"state_dict: a group of operator {group['operator']!r} was loaded where this optimizer has {operator!r}, so their states are "
                    "mixed up; build the optimizer anew, apply the same schedules in the same order as before the checkpoint, and load again"
                )
            if operator is not None:
                fields.write(group, schedule.operators[operator].coefficients)

    return put_into_force


def _operator_of(schedule: Schedule, model: nn.Module, operators: OperatorRule | None) -> Callable[[Tensor], str | None]:
    """The operator of the schedule that a parameter belongs to, None where there is none."""
    names = {id(p): clean_name(name) for name, p in model.named_parameters()}

    def operator_of(parameter: Tensor) -> str | None:
        if (name := names.get(id(parameter))) is None:
            return None
        return schedule.operator_of(name, classify(name, operators))

    return operator_of


def _warn(optimizer: Optimizer, schedule: Schedule, scheduled: Scheduled) -> None:
    """Say once what of the schedule cannot hold on this optimizer."""
    name = class_name(type(optimizer))
    if any(fields.coefficients is None for _, _, fields in scheduled):
        log.warning(
            "optiscope: %s takes a number of Newton–Schulz steps per group and no coefficients: the schedule's steps are in force with the "
            "optimizer's own coefficients, for which the residuals that the schedule predicts do not hold.",
            name,
        )
    for text in {gram_form_warning(group, schedule.operators[operator].coefficients): None for group, operator, _ in scheduled}:
        if text is not None:
            log.warning("optiscope: %s: %s.", name, text)
