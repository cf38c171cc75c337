"""Putting a schedule into force on `torch.optim.Muon`: its own steps, and coefficients of every step, per operator."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer
from torch.optim import _muon as torch_muon
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from ..diagnostics.operators import OperatorRule, classify, clean_name
from ..diagnostics.schedule import Schedule

_torch_newton_schulz = torch_muon._zeropower_via_newtonschulz

# The lists that torch's schedulers keep with one entry per parameter group.
_PER_GROUP = frozenset({"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})

# What puts the schedule of an optimizer back after `load_state_dict`; a new schedule takes the place of the old one.
_reload_hooks: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()


def apply_schedule(
    optimizer: Optimizer,
    schedule: Schedule,
    model: nn.Module,
    *,
    lr_schedulers: Iterable[LRScheduler] = (),
    operators: OperatorRule | None = None,
) -> dict[str, int]:
    """Give every matrix of `optimizer` the Newton–Schulz steps and coefficients that `schedule` holds for its operator.

    Parameter groups are split by operator, in place and in order; state, learning rates and every other setting stay as
    they are, so that a schedule equal to the present settings changes nothing, to the bit. Each group then holds
    `operator`, `ns_steps` and, in `ns_coefficients`, one plain (a, b, c) per step.

    torch.optim.Muon itself takes one triple for all steps. Its Newton–Schulz function is therefore replaced, once per
    process, by one that understands a list of triples and hands everything else to torch's own: optimizers without a
    schedule are not affected. A checkpoint holds the plain lists. To resume from one written under the schedule: build
    the optimizer, apply the schedule, build the learning-rate scheduler, load. From one written before it: build, load, then
    apply and pass the scheduler. Steps and coefficients that a checkpoint brings are put back to the schedule's.

    Args:
        optimizer: a `torch.optim.Muon`.
        schedule: as from `Schedule.load`.
        model: where parameter names come from. A matrix belongs to the operator that lists its name; else to the
            operator of its classified name; where the schedule has neither, its settings stay.
        lr_schedulers: learning-rate schedulers already built on `optimizer`; their per-group lists are extended to the
            new groups. Not needed for those built afterwards.
        operators: your own naming, as in `attach`.

    Returns:
        Number of matrices per operator that got a schedule.

    Raises:
        TypeError: not a `torch.optim.Muon`.
        ValueError: no matrix of the optimizer is in the schedule, an operator has no step, or a scheduler exists that was
            not passed.
        RuntimeError: this version of torch does not run the function that would be replaced.
    """
    if not isinstance(optimizer, Muon):
        raise TypeError(f"optimizer: a schedule can be applied to torch.optim.Muon, got {type(optimizer).__name__}")
    if "_zeropower_via_newtonschulz" not in torch_muon._single_tensor_muon.__code__.co_names:
        raise RuntimeError(f"torch {torch.__version__}: its Muon takes no coefficients per step here; use torch 2.9 to 2.13")
    if empty := [name for name, entry in schedule.operators.items() if not entry.coefficients]:
        raise ValueError(f"schedule: {', '.join(empty)}: expected at least one Newton–Schulz step, got none")
    # Each once, and not those of the other optimizers of a training, whose groups are not split.
    schedulers = list({id(s): s for s in _flatten(lr_schedulers) if s.optimizer is optimizer}.values())
    names = {id(p): clean_name(name) for name, p in model.named_parameters()}

    def operator_of(parameter: Tensor) -> str | None:
        if (name := names.get(id(parameter))) is None:
            return None
        listed = schedule.operator_of(name)
        if listed is None and (classified := classify(name, operators)) in schedule.operators:
            return classified
        return listed

    split = [_split(group, operator_of) for group in optimizer.param_groups]
    counts = _counts(split)
    if not counts:
        raise ValueError(
            f"schedule: none of the optimizer's matrices is one of its operators ({', '.join(schedule.operators)}); pass the model they were recorded from"
        )
    if max(map(len, split)) > 1:
        _extend_schedulers(optimizer, schedulers, [len(parts) for parts in split])
    optimizer.param_groups[:] = [part for parts in split for part in parts]
    in_force = [group["operator"] for group in optimizer.param_groups]

    def put_into_force(target: Optimizer) -> None:
        # By position: the groups of a checkpoint from before the schedule hold no operator.
        for group, operator in zip(target.param_groups, in_force, strict=False):
            if group.setdefault("operator", operator) != operator:
                raise ValueError(
                    f"state_dict: a group of operator {group['operator']!r} was loaded where this optimizer has {operator!r}, so their states are "
                    "mixed up; build the optimizer anew, apply the same schedules in the same order as before the checkpoint, and load again"
                )
            if operator is not None:
                coefficients = schedule.operators[operator].coefficients
                group["ns_steps"] = len(coefficients)
                group["ns_coefficients"] = [list(triple) for triple in coefficients]

    put_into_force(optimizer)
    if (previous := _reload_hooks.pop(optimizer, None)) is not None:
        previous.remove()
    _reload_hooks[optimizer] = optimizer.register_load_state_dict_post_hook(put_into_force)
    torch_muon._zeropower_via_newtonschulz = newton_schulz_per_step
    return counts


def newton_schulz_per_step(grad: Tensor, ns_coefficients: Any, ns_steps: int, eps: float) -> Tensor:
    """torch.optim.Muon's iteration (bfloat16, X₀ = M/max(‖M‖_F, eps)) with a triple per step; the last one repeats.

    A single triple goes to torch's own function. With the same triple at every step both give the same bits.
    """
    if not isinstance(ns_coefficients[0], (list, tuple)):
        return _torch_newton_schulz(grad, ns_coefficients, ns_steps, eps)
    tall = grad.size(0) > grad.size(1)
    x = grad.bfloat16()
    x = x.T if tall else x
    # Not in place as in torch: with a bfloat16 gradient that would overwrite the momentum buffer.
    x = x / x.norm().clamp(min=eps)
    for step in range(ns_steps):
        a, b, c = ns_coefficients[min(step, len(ns_coefficients) - 1)]
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _split(group: dict[str, Any], operator_of: Any) -> list[dict[str, Any]]:
    """One group per operator, in order of appearance; parameters without one keep the group's settings."""
    by_operator: dict[str | None, list[Tensor]] = {}
    for parameter in group["params"]:
        by_operator.setdefault(operator_of(parameter), []).append(parameter)
    # ReduceLROnPlateau changes a learning rate that is a tensor in place, group after group: each part needs its own.
    copied = [key for key, value in group.items() if isinstance(value, Tensor) and len(by_operator) > 1]
    return [
        {**group, **{key: group[key].clone() for key in copied}, "params": parameters, "operator": operator}
        for operator, parameters in by_operator.items()
    ]


def _counts(split: list[list[dict[str, Any]]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in (part for parts in split for part in parts):
        if part["operator"] is not None:
            counts[part["operator"]] = counts.get(part["operator"], 0) + len(part["params"])
    return counts


def _flatten(schedulers: Iterable[Any]) -> list[Any]:
    """Schedulers and those inside SequentialLR and ChainedScheduler."""
    return [inner for outer in schedulers for inner in (outer, *_flatten(getattr(outer, "_schedulers", ())))]


def _extend_schedulers(optimizer: Muon, schedulers: list[Any], parts: list[int]) -> None:
    """Repeat every per-group list of the schedulers for the groups that each group is split into."""
    if not schedulers and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ValueError(
            "lr_schedulers: this optimizer already has a learning-rate scheduler; pass it, or apply the schedule before building it"
        )
    for scheduler in schedulers:
        for key, value in list(vars(scheduler).items()):
            if key in _PER_GROUP and isinstance(value, list):
                setattr(scheduler, key, [item for item, count in zip(value, parts, strict=True) for _ in range(count)])
