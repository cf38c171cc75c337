"""Splitting parameter groups by operator, and telling the learning-rate schedulers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..adapters import Group, adapter_for

# The lists that torch's schedulers keep with one entry per parameter group.
_PER_GROUP = frozenset({"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})


def split_by_operator(
    optimizer: Optimizer, operator_of: Callable[[Tensor], str | None], takes: Callable[[Group], bool]
) -> list[list[dict[str, Any]]]:
    """For each group of `optimizer` the groups it becomes: one per operator, in order of appearance.

    Parameters without an operator, and those of a group that are left to AdamW one by one, keep the group's settings under
    the operator None. A group that takes no schedule stays itself.

    Raises:
        ValueError: matrices that are orthogonalised as one are of different operators.
    """

    def operator(parameter: Tensor) -> str | None:
        # Moonlight, MARS-M and timm note in a parameter's own state that AdamW updates it. `get`: looking must not add to the state.
        by_muon = parameter.ndim >= 2 and (optimizer.state.get(parameter) or {}).get("use_muon", True)
        return operator_of(parameter) if by_muon else None

    return [_split(optimizer, group, operator) if takes(group) else [group] for group in optimizer.param_groups]


def _split(optimizer: Optimizer, group: dict[str, Any], operator_of: Callable[[Tensor], str | None]) -> list[dict[str, Any]]:
    by_operator: dict[str | None, list[Tensor]] = {}
    for parameter in group["params"]:
        by_operator.setdefault(operator_of(parameter), []).append(parameter)
    adapter = adapter_for(optimizer, group)
    for stack in adapter.stacks(group) if adapter is not None and adapter.stacks is not None else ():
        if len(operators := {operator_of(parameter) for parameter in stack}) > 1:
            raise ValueError(
                f"schedule: a stack of matrices that are orthogonalised as one holds the operators {', '.join(sorted(map(str, operators)))}; "
                "give them the same name with `operators`, or build stacks of one operator"
            )
    # ReduceLROnPlateau changes a learning rate that is a tensor in place, group after group: each part needs its own.
    copied = [key for key, value in group.items() if isinstance(value, Tensor) and len(by_operator) > 1]
    return [
        {**group, **{key: group[key].clone() for key in copied}, "params": parameters, "operator": operator}
        for operator, parameters in by_operator.items()
    ]


def owned_by_place(optimizer: Optimizer) -> bool:
    """Whether ranks own matrices, and their momenta, by the place in a group that a split would change."""
    started = any(isinstance(value, Tensor) for state in optimizer.state.values() for value in state.values())
    return started and getattr(optimizer, "world_size", 1) > 1


def schedulers_of(layers: Sequence[Any], schedulers: Iterable[Any]) -> list[Any]:
    """The schedulers of these optimizers among `schedulers`, each once; what holds others is looked into.

    Raises:
        ValueError: one of the optimizers has a scheduler, and none was passed.
    """
    # Not those of the other optimizers of a training, whose groups are not split.
    found = {id(s): s for s in _flatten(schedulers) if any(getattr(s, "optimizer", None) is layer for layer in layers)}
    if not found and any(hasattr(layer.step, "_wrapped_by_lr_sched") for layer in layers):
        raise ValueError(
            "lr_schedulers: this optimizer already has a learning-rate scheduler; pass it, or apply the schedule before building it"
        )
    return list(found.values())


def _flatten(schedulers: Iterable[Any]) -> list[Any]:
    """Schedulers and those inside SequentialLR, ChainedScheduler and Accelerate's wrapper."""
    return [inner for outer in schedulers for inner in (outer, *_flatten(_inside(outer)))]


def _inside(scheduler: Any) -> Sequence[Any]:
    wrapped = getattr(scheduler, "scheduler", None)
    return (*getattr(scheduler, "_schedulers", ()), *(() if wrapped is None else (wrapped,)))


def extend_schedulers(schedulers: Iterable[Any], parts: Sequence[int]) -> None:
    """Repeat every per-group list of the schedulers for the groups that each group is split into.

    Raises:
        ValueError: one of them is of more or fewer groups; none is changed then.
    """
    lists = [(s, key, value) for s in schedulers for key, value in vars(s).items() if key in _PER_GROUP and isinstance(value, list)]
    for scheduler, key, value in lists:
        if len(value) != len(parts):
            raise ValueError(
                f"lr_schedulers: {type(scheduler).__name__} holds {len(value)} `{key}` and the optimizer {len(parts)} parameter groups; build it "
                "after the last add_param_group"
            )
    for scheduler, key, value in lists:
        setattr(scheduler, key, [item for item, count in zip(value, parts, strict=True) for _ in range(count)])
