"""Whether what an optimizer keeps is of single parameters, so that a group of them can be split; and, after a split, whether it still is.

Most optimizers keep under a parameter what is of that parameter. Some keep one tensor for a whole group (nanochat's Muon: the momenta of
all K matrices, of shape (K, m, n), under the first one). Such a group, split, would hand matrices each other's momenta without a word.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..adapters import Group, class_name, state_of
from ..adapters.names import Path, tensors_in
from ..guard import KeptOut
from .schedule_fields import COEFFICIENT_FIELDS

log = logging.getLogger("optiscope")


def check_splittable(optimizer: Optimizer, group: Group) -> None:
    """Refuse to split a group whose state is not kept parameter by parameter.

    Looked at are shapes, keys and storages. Nothing kept yet tells nothing: :func:`look_after_next_step` looks again.

    Raises:
        ValueError: some of what the optimizer keeps is of several of the group's parameters.
    """
    if (kept := next(_of_several(optimizer, group), None)) is not None:
        started = bool(optimizer.state)
        raise ValueError(
            f"optimizer: {class_name(type(optimizer))} keeps {kept}: not of one matrix alone. The schedule would split the group of these "
            f"{len(group['params'])} parameters by operator, and they would get each other's; {'apply it before the first step, or ' if started else ''}"
            "build the optimizer with a parameter group per operator"
        )


def look_after_next_step(optimizer: Optimizer, split: Sequence[Sequence[Group]]) -> None:
    """After the next step, warn where the optimizer goes on as if groups that were split were still one.

    Before its first step an optimizer keeps nothing by which that can be told. One that stacks the matrices of a group as it finds it is right
    with the parts; one that noted the groups when it was built is not.

    Args:
        split: the parts of every group, as :func:`.group_splitting.split_by_operator` gives them.
    """
    torn = [parts for parts in split if len(parts) > 1]

    @_disable_dynamo
    def look(_: Any, __: Any, ___: Any) -> None:
        if not torn:
            return
        kept = None
        with KeptOut(lambda error: log.debug("optiscope: what %s keeps could not be looked at: %r", class_name(type(optimizer)), error)):
            kept = next((found for parts in torn for found in _across_parts(optimizer, parts)), None)
            torn.clear()  # once; the hook stays, as torch has none that removes itself while it goes through them
        if kept is not None:
            log.warning(
                "optiscope: after the first step under the schedule %s keeps %s: it goes by groups that it noted before the schedule split them, so that "
                "steps and coefficients may not be those of the schedule, and matrices may get each other's momenta. Build the optimizer with a "
                "parameter group per operator.", class_name(type(optimizer)), kept,
            )  # fmt: skip

    if torn:
        optimizer.register_step_post_hook(look)


def _of_several(optimizer: Optimizer, group: Group) -> Iterator[str]:
    """What is kept of several parameters of the group together, in words."""
    matrices = [p for p in group["params"] if p.ndim >= 2]
    held = [tensors_in(state_of(optimizer, p)) for p in matrices]
    holders = Counter(path for tensors in held for path in tensors)
    for p, tensors in zip(matrices, held, strict=True):
        for path, tensor in tensors.items():
            # What every one of them has for itself may have any shape: a history, factors, the parts of an encoding.
            if holders[path] < len(matrices) and not _is_own(tensor, p, len(matrices) if holders[path] == 1 else None):
                yield f"`{_spelled(path)}` of shape {tuple(tensor.shape)} under one of {len(matrices)} parameters of shape {tuple(p.shape)}"
    yield from _with_the_first(optimizer, matrices)
    yield from _one_in_several(optimizer, [[p] for p in group["params"]])
    yield from (
        f"`{_spelled(path)}` of shape {tuple(t.shape)} in its state, under a key that is no parameter"
        for path, t in _under_other_keys(optimizer)
    )
    smallest = min(p.numel() for p in matrices)
    settings = {key: value for key, value in group.items() if key not in ("params", *COEFFICIENT_FIELDS)}
    elsewhere = [(path, t, "in the parameter group") for path, t in tensors_in(settings).items() if t.numel() > 1]
    elsewhere += [(path, t, "on the optimizer itself") for path, t in _on_the_optimizer(optimizer)]
    for path, t, where in elsewhere:
        if t.numel() >= smallest or _stacks(t, matrices[0], len(matrices)):  # not a few numbers for all
            yield f"`{_spelled(path)}` of shape {tuple(t.shape)} {where}"


def _across_parts(optimizer: Optimizer, parts: Sequence[Group]) -> Iterator[str]:
    """What is kept of parameters that are in several of these groups, in words."""
    whole = [p for part in parts for p in part["params"] if p.ndim >= 2]
    holders = Counter(path for p in whole for path in tensors_in(state_of(optimizer, p)))
    for part in parts:
        count = sum(p.ndim >= 2 for p in part["params"])
        for p in part["params"]:
            for path, t in tensors_in(state_of(optimizer, p)).items():
                if holders[path] < len(whole) and not _is_own(t, p, None) and t.numel() > count * p.numel():
                    yield f"`{_spelled(path)}` of shape {tuple(t.shape)} under one of {count} parameters of shape {tuple(p.shape)}"
    yield from _one_in_several(optimizer, [part["params"] for part in parts])
    for path, t in (*_under_other_keys(optimizer), *_on_the_optimizer(optimizer)):
        if t.shape[0] == len(whole) and _stacks(t, whole[0], len(whole)):
            yield f"`{_spelled(path)}` of shape {tuple(t.shape)}, as many as were in one group"


def _is_own(tensor: Tensor, parameter: Tensor, holds_for: int | None) -> bool:
    """Whether a tensor's shape is that of a parameter's own state: the parameter's, a number, a reduction, a factor.

    `holds_for` is how many parameters it could be of, where it is under one of them only.
    """
    shape, own = tuple(tensor.shape), tuple(parameter.shape)
    if tensor.numel() <= 1 or shape == own:
        return True
    if holds_for is not None and (shape[0] == holds_for or tensor.numel() == holds_for * parameter.numel()):
        return False
    if shape == (parameter.numel(),):
        return True
    is_factor = len(set(shape)) == 1  # of Kronecker's: (n, n), which may be larger than the parameter
    return len(shape) <= len(own) and any(d in own for d in shape) and (is_factor or tensor.numel() <= parameter.numel())


def _stacks(tensor: Tensor, parameter: Tensor, count: int) -> bool:
    """Whether it could be `count` such parameters, or a reduction of them, side by side."""
    return tensor.shape[0] == count and all(d in (1, *parameter.shape) for d in tensor.shape[1:])


def _with_the_first(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Iterator[str]:
    """What the first of them has beside all that the others have: the group's own, such as a count of its steps."""
    keys = [set(state_of(optimizer, p)) for p in parameters]
    others = [found for found in keys[1:] if found]
    if others and all(found < keys[0] for found in others):
        yield f"`{sorted(map(str, keys[0].difference(*others)))[0]}` under the first of {len(parameters)} parameters only"


def _one_in_several(optimizer: Optimizer, sets: Iterable[Iterable[Tensor]]) -> Iterator[str]:
    """Tensors that share their memory, in the states of parameters of several sets."""
    first: dict[int, int] = {}
    for i, parameters in enumerate(sets):
        for p in parameters:
            for path, t in tensors_in(state_of(optimizer, p)).items():
                if (storage := _storage(t)) is not None and first.setdefault(storage, i) != i:
                    yield f"`{_spelled(path)}` of several parameters in the same memory"


def _storage(tensor: Tensor) -> int | None:
    """The address of a tensor's memory, None where it has none of its own."""
    try:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor's piece
        return int(local.untyped_storage().data_ptr()) or None
    except (RuntimeError, NotImplementedError):
        return None


def _under_other_keys(optimizer: Optimizer) -> Iterator[tuple[Path, Tensor]]:
    """Tensors in the optimizer's state that no parameter leads to; not those of parameters that have left it."""
    ids = _ids(optimizer)
    for key, value in optimizer.state.items() if isinstance(optimizer.state, Mapping) else ():
        if not _is_parameter(key, ids) and not isinstance(key, nn.Parameter):
            yield from ((path, t) for path, t in tensors_in({_spelled((key,)): value}).items() if t.numel() > 1)


def _on_the_optimizer(optimizer: Optimizer) -> Iterator[tuple[Path, Tensor]]:
    """Tensors in attributes of the optimizer: neither parameters, nor kept by parameter."""
    ids = _ids(optimizer)
    attributes = {key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups", "defaults")}
    for path, t in tensors_in(attributes).items():
        if t.numel() > 1 and not _is_parameter(t, ids) and not any(_is_parameter(key, ids) for key in path):
            yield path, t


def _ids(optimizer: Optimizer) -> Mapping[int, Tensor]:
    return {id(p): p for group in optimizer.param_groups for p in group["params"]}


def _is_parameter(thing: Any, ids: Mapping[int, Tensor]) -> bool:
    """Whether it is a parameter, or the id of one."""
    return id(thing) in ids or (isinstance(thing, int) and thing in ids)


def _spelled(path: Path) -> str:
    """A path as text: buffers.0; what is neither a word nor a number by its class."""
    return ".".join(str(key) if isinstance(key, (str, int)) else type(key).__name__ for key in path)
