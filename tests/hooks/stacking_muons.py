"""Muons that go by the group: momenta of a group in one tensor, and one list of coefficients that they slice. As nanochat's, written out plainly."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from muons import TwoLayers, newton_schulz
from torch import Tensor
from torch.optim import Optimizer

FIVE = (
    (8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061), (3.2858, -2.3681, 0.4645), (2.3465, -1.7098, 0.4232),
)  # fmt: skip


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile leaves of a function to who looks at it: a wrapper that knows it."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


@compiled
def stacked_step(gradients: Tensor, parameters: Tensor, momentum: Tensor, lr: float, ns_steps: int) -> None:
    momentum.lerp_(gradients, 0.05)
    for parameter, m in zip(parameters, momentum, strict=True):
        x = m.double()
        for step, triple in enumerate(FIVE[:ns_steps]):
            x = newton_schulz(x, [triple]) if step == 0 else one_step(x, triple)
        parameter.sub_(x.float(), alpha=lr)


def one_step(x: Tensor, triple: tuple[float, float, float]) -> Tensor:
    gram = x @ x.mT
    return triple[0] * x + (triple[1] * gram + triple[2] * gram @ gram) @ x


class GroupMuon(Optimizer):
    """All matrices of a group have one shape; their momenta are of shape (K, m, n), kept where `buffer` says."""

    def __init__(self, groups: Iterable[Any]) -> None:
        super().__init__(groups, {"lr": 0.02, "ns_steps": 5})

    def buffer(self, group: dict[str, Any], like: Tensor) -> Tensor:
        """Under the first parameter, as nanochat does."""
        return self.state[group["params"][0]].setdefault("momentum_buffer", torch.zeros_like(like))

    def batches(self) -> Iterable[dict[str, Any]]:
        return self.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.batches():
            parameters = torch.stack(list(group["params"]))
            stacked_step(
                torch.stack([p.grad for p in group["params"]]), parameters, self.buffer(group, parameters), group["lr"], group["ns_steps"]
            )
            torch._foreach_copy_(group["params"], list(parameters.unbind(0)))


class InTheGroup(GroupMuon):
    """Momenta beside the settings."""

    def buffer(self, group: dict[str, Any], like: Tensor) -> Tensor:
        return group.setdefault("momentum_buffer", torch.zeros_like(like))


class OnTheOptimizer(GroupMuon):
    """Momenta in an attribute, by the number of the group."""

    def buffer(self, group: dict[str, Any], like: Tensor) -> Tensor:
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        self.__dict__.setdefault("buffers", {})
        return self.buffers.setdefault(number, torch.zeros_like(like))


class UnderAnotherKey(GroupMuon):
    """Momenta in the state, under the shape."""

    def buffer(self, group: dict[str, Any], like: Tensor) -> Tensor:
        return self.state[tuple(group["params"][0].shape)].setdefault("momentum_buffer", torch.zeros_like(like))


class InOneMemory(GroupMuon):
    """Every parameter has its own momentum, all of them views of one tensor that the optimizer goes by."""

    def buffer(self, group: dict[str, Any], like: Tensor) -> Tensor:
        if "momentum_buffer" not in self.state[group["params"][0]]:
            for p, view in zip(group["params"], torch.zeros_like(like), strict=True):
                self.state[p]["momentum_buffer"] = view
        return self.state[group["params"][0]]["momentum_buffer"]._base


class ByAPlan(GroupMuon):
    """Batches noted when it is built, so that it goes on with them whatever becomes of the groups."""

    def __init__(self, groups: Iterable[Any]) -> None:
        super().__init__(groups)
        self.plan = [dict(group) for group in self.param_groups]

    def batches(self) -> Iterable[dict[str, Any]]:
        return self.plan


STACKING = (GroupMuon, InTheGroup, OnTheOptimizer, UnderAnotherKey, InOneMemory)


def by_shape(model: TwoLayers) -> list[dict[str, Any]]:
    """One group per shape, as these optimizers want it: `attn_q` and `other` are both 16 × 16, and share one."""
    shapes: dict[Any, list[Tensor]] = {}
    for p in model.of_muon().values():
        shapes.setdefault(p.shape, []).append(p)
    return [{"params": parameters} for parameters in shapes.values()]


def by_operator(model: TwoLayers, operator_of: Callable[[str], str]) -> list[dict[str, Any]]:
    """One group per operator, in the order in which a split of :func:`by_shape` makes them."""
    operators: dict[str, list[Tensor]] = {}
    for name, p in sorted(model.of_muon().items(), key=lambda item: [g["params"][0].shape for g in by_shape(model)].index(item[1].shape)):
        operators.setdefault(operator_of(name), []).append(p)
    return [{"params": parameters} for parameters in operators.values()]
