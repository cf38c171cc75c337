"""Stand-ins for optimizers whose library cannot be installed here: small ones that keep their state as the library does.

A row of the adapter table is tested on them, not on the library. Each reports the library's full class name, so that the table's row
matches, and has its keys, nesting, shapes, formats and packing, and the facts of the step that a reading depends on: what is
orthogonalised, what is averaged, which learning rate the decay is multiplied with. All this was read in the library's public source;
what a class docstring calls *left out* is what the library does besides. The step is otherwise the shortest thing that moves the weights.

Those that orthogonalise are in `standins_muon`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def reported_as(module: str, name: str) -> Callable[[Any], Any]:
    """Give a class or a function the full name that the library's has."""

    def rename(what: Any) -> Any:
        what.__module__, what.__qualname__ = module, name
        return what

    return rename


class StandIn(Optimizer):
    """A step over all parameters with a gradient, one by one."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.one(p, p.grad, self.state[p], group)

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class WeightDecayType(Enum):
    """Distributed Shampoo's."""

    L2 = "L2"
    DECOUPLED = "DECOUPLED"
    CORRECTED = "CORRECTED"
    INDEPENDENT = "INDEPENDENT"


@dataclass
class Factors:
    """What `state[p]["block_k"]["shampoo"]` is."""

    factor_matrices: tuple[Tensor, ...]  # the packed upper triangle, row after row, of each axis's


@reported_as("distributed_shampoo.distributed_shampoo", "DistributedShampoo")
class DistributedShampoo(StandIn):
    """facebookresearch/optimizers, on one device: blocks of at most `max_preconditioner_dim`, row by row, small axes merged into one; factors
    packed by default (whole in older versions), their averages begun at zero; `weight_decay_type` (in older versions a flag). Left out:
    bias correction, grafting, the preconditioner's frequency."""

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, max_preconditioner_dim: int = 16, weight_decay: float = 0.0,
        weight_decay_type: WeightDecayType = WeightDecayType.DECOUPLED, peak_lr: float = 0.02, use_symmetric_packing: bool = True,
    ) -> None:  # fmt: skip
        settings = {"lr": lr, "betas": (0.9, 0.99), "epsilon": 1e-3, "weight_decay": weight_decay, "weight_decay_type": weight_decay_type}
        settings |= {"peak_lr": peak_lr, "iterate_averaging_config": None, "max_preconditioner_dim": max_preconditioner_dim}
        super().__init__(params, settings)
        self.packs = use_symmetric_packing

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (beta1, beta2), limit, decay = group["betas"], group["max_preconditioner_dim"], group["weight_decay"]
        kind, lr, peak = group["weight_decay_type"], group["lr"], group["peak_lr"]
        if kind is WeightDecayType.L2:
            g = g + decay * p
        else:
            p.mul_(1 - lr * decay * {"DECOUPLED": 1, "CORRECTED": lr / peak, "INDEPENDENT": 1 / peak}[kind.name])
        state.setdefault("step", torch.tensor(0)).add_(1)  # the library's is in the first parameter's state
        merged = (-1,) if p.numel() <= limit else p.shape
        blocks, grads = [p.view(merged)], [g.view(merged)]
        for axis in range(blocks[0].ndim):
            blocks, grads = ([part for x in of for part in x.split(limit, axis)] for of in (blocks, grads))
        for k, (block, grad) in enumerate(zip(blocks, grads, strict=True)):
            kept = state.setdefault(f"block_{k}", {})
            if not kept:
                empty = (grad.new_zeros(n * (n + 1) // 2) if self.packs else grad.new_zeros(n, n) for n in grad.shape)
                kept.update(filtered_grad=torch.zeros_like(grad), shampoo=Factors(tuple(empty)))
            kept["filtered_grad"].lerp_(grad, 1 - beta1)
            update = kept["filtered_grad"]
            for axis, factor in enumerate(kept["shampoo"].factor_matrices):
                unfolded = grad.movedim(axis, 0).reshape(grad.shape[axis], -1)
                upper = tuple(torch.triu_indices(len(unfolded), len(unfolded)))
                outer = unfolded @ unfolded.mT
                factor.lerp_(outer[upper] if self.packs else outer, 1 - beta2)
                square = torch.zeros(len(unfolded), len(unfolded))
                square[upper] = factor if self.packs else factor[upper]
                values, vectors = torch.linalg.eigh(square.mT + square.triu(1))
                root = (vectors * (values.clamp(min=0) + group["epsilon"]) ** (-0.5 / grad.ndim)) @ vectors.mT
                update = torch.tensordot(update, root, dims=([0], [0]))
            block.add_(update, alpha=-lr)


@reported_as("soap", "SOAP")
class SOAP(StandIn):
    """nikhilvyas/SOAP: `exp_avg` and `exp_avg_sq` in the rotated basis, `exp_avg` turned on whenever Q changes; `Q` and `GG` lists with an empty
    entry for an axis that is too long; first step skipped, `step` still 0 after it; decay after the update. Left out: bias correction, the
    order of the eigenvectors and of `exp_avg_sq` with them."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        precondition_frequency: int = 2,
        max_precond_dim: int = 10000,
    ) -> None:
        settings = {"lr": lr, "betas": (0.95, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "precondition_frequency": precondition_frequency, "max_precond_dim": max_precond_dim})

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (beta1, beta2), limit = group["betas"], group["max_precond_dim"]
        first = not state
        if first:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["GG"] = [torch.zeros(n, n) if n <= limit else [] for n in p.shape]
            state["Q"] = [torch.eye(n) if n <= limit else [] for n in p.shape]
        else:
            state["step"] += 1
            rotated = self.turn(g, state["Q"], 0)
            m, v = state["exp_avg"].lerp_(rotated, 1 - beta1), state["exp_avg_sq"].lerp_(rotated.square(), 1 - beta2)
            p.sub_(self.turn(m / (v.sqrt() + group["eps"]), state["Q"], 1), alpha=group["lr"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
        for factor, x in zip(state["GG"], (g, g.mT), strict=True):
            if len(factor):
                factor.lerp_(x @ x.mT, 1 - beta2)
        if first or state["step"] % group["precondition_frequency"] == 0:
            original = self.turn(state["exp_avg"], state["Q"], 1)
            state["Q"] = [torch.linalg.qr(f @ q + 1e-6 * q).Q if len(f) else [] for f, q in zip(state["GG"], state["Q"], strict=True)]
            state["exp_avg"] = self.turn(original, state["Q"], 0)

    @staticmethod
    def turn(x: Tensor, bases: list[Any], axis: int) -> Tensor:
        """Into the basis (axis 0) or back (axis 1): contracting each dimension of x in turn leaves their order as it was."""
        for q in bases:
            x = torch.tensordot(x, q, dims=([0], [axis])) if len(q) else x.mT
        return x


class KFACPreconditioner:
    """kfac_pytorch's `kfac.preconditioner.KFACPreconditioner` with explicit inverses, for linear layers without bias: no optimizer; its `step`
    replaces the gradients by (G + γI)⁻¹·∇W·(A + γI)⁻¹ before the optimizer's. Averages of the factors begin at the identity. Left out: the
    scale `kl_clip`, which is common to all layers, and the default form of the inverse, in the factors' eigenbases."""

    @dataclass
    class Layer:
        """Averages of aaᵀ and ggᵀ over a batch, and what they are made of."""

        module: nn.Linear
        a: Tensor | None = None
        g: Tensor | None = None
        _a_factor: Tensor | None = None
        _g_factor: Tensor | None = None

    def __init__(self, model: nn.Module, damping: float = 0.1, factor_decay: float = 0.95) -> None:
        self._layers = {m: (name, self.Layer(m)) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.damping, self.factor_decay = damping, factor_decay
        for module in self._layers:
            module.register_forward_hook(self.see)

    def see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the input, and the gradient of the output once it is there."""
        _, layer = self._layers[module]
        layer.a = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda g: setattr(layer, "g", g.flatten(0, -2)))

    @torch.no_grad()
    def step(self) -> None:
        for _, layer in self._layers.values():
            for side in ("a", "g"):
                x, factor = getattr(layer, side), getattr(layer, f"_{side}_factor")
                factor = torch.eye(x.shape[1]) if factor is None else factor
                setattr(layer, f"_{side}_factor", factor.lerp(x.mT @ x / len(x), 1 - self.factor_decay))
            damped = (f + self.damping * torch.eye(len(f)) for f in (layer._g_factor, layer._a_factor))
            g, a = (torch.linalg.inv(f) for f in damped)
            layer.module.weight.grad = g @ layer.module.weight.grad @ a
