"""A copy of an optimizer with some of its parameters, whose step touches nothing of the original's."""

import copy
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer


class Twin:
    """The copy.

    Attributes:
        optimizer: of the original's class, with copies of parameters, gradients, state and all else that it holds.
        parameters: the copies, by the `id` of what each is a copy of.
        tensors: all that were copied.
    """

    def __init__(
        self, optimizer: Any, group: Mapping[str, Any], parameters: Sequence[Tensor], gradients: Mapping[int, Tensor] | None = None
    ) -> None:
        """Copy what a step of `parameters`, which are of one `group`, needs; with `gradients` by their `id` in the place of their own.

        Raises:
            Exception: whatever keeps a part of the optimizer from being copied.
        """
        memo: dict[int, Any] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        for p in parameters:
            twin = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            gradient = p.grad if gradients is None else gradients[id(p)]
            twin.grad = None if gradient is None else gradient.detach().clone()
            memo[id(p)] = self.parameters[id(p)] = twin
        for other in (q for one in optimizer.param_groups for q in one["params"]):
            memo.setdefault(id(other), _ABSENT)
        for holder in (vars(optimizer), *optimizer.param_groups):
            for value in holder.values():
                if isinstance(value, torch.Generator):  # which cannot be copied as other objects can
                    memo[id(value)] = value.clone_state()
                elif isinstance(value, nn.Module):  # the whole model: what of it the step would change, the trace refuses
                    memo[id(value)] = value
        made = object.__new__(type(optimizer))
        memo[id(optimizer)] = made
        held = vars(optimizer)
        hooks: dict[str, Any] = {
            key: OrderedDict() for key, value in held.items() if key.endswith("_hooks") and isinstance(value, OrderedDict)
        }
        own = {id(p) for p in parameters}
        state = {key: value for key, value in held["state"].items() if not isinstance(key, Tensor) or id(key) in own}
        some = {**group, "params": list(parameters)}
        memo[id(group)] = copied = copy.deepcopy(some, memo)
        made.__dict__.update(hooks)
        rest = {key: value for key, value in held.items() if key not in hooks and key not in ("state", "param_groups", "step")}
        made.__dict__.update(copy.deepcopy(rest, memo))
        made.param_groups = [copied]
        made.state = type(held["state"])(*((held["state"].default_factory,) if hasattr(held["state"], "default_factory") else ()))
        made.state.update(copy.deepcopy(state, memo))
        self.optimizer = made
        copies = [value for value in memo.values() if isinstance(value, Tensor)]
        self.tensors = [*copies, *(twin.grad for twin in self.parameters.values() if twin.grad is not None)]

    def step(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """One step of the copy's class, without any hook; arguments but for a closure are those of the original's."""
        step = type(self.optimizer).step
        positional = [arg for arg in args if not callable(arg)]
        named = {key: value for key, value in (kwargs or {}).items() if key != "closure"}
        with _no_global_hooks(), torch.no_grad():
            types.MethodType(getattr(step, "__wrapped__", step), self.optimizer)(*positional, **named)


_ABSENT = None  # what stands in a copy for a parameter that was not copied


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    """Without the step hooks of all optimizers, which a `step` that calls that of its base would run."""
    all_hooks: tuple[dict[int, Any], ...] = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    kept = [dict(hooks) for hooks in all_hooks]
    try:
        for hooks in all_hooks:
            hooks.clear()
        yield
    finally:
        for hooks, before in zip(all_hooks, kept, strict=True):
            hooks.update(before)


@contextmanager
def nothing_drawn_or_compiled(devices: Sequence[torch.device]) -> Iterator[None]:
    """Random numbers drawn within are drawn again after it, and compiled functions run as they are written."""
    with ExitStack() as stack:
        _put_back(stack, random.getstate, random.setstate)
        if "numpy" in sys.modules:
            numpy_random = sys.modules["numpy"].random
            _put_back(stack, numpy_random.get_state, numpy_random.set_state)
        cuda = [device for device in devices if device.type == "cuda"]
        stack.enter_context(torch.random.fork_rng(devices=[device.index or 0 for device in cuda], enabled=True))
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _put_back(stack: ExitStack, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
    stack.callback(put, get())
