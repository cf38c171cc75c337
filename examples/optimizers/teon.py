"""TEON: one orthogonalisation for several layers (arXiv 2601.23261), in the mode-1 form that the paper settles on.

    M_t^(k) = μ·M_{t−1}^(k) + G_t^(k)                      k = 1 … K, layers of one shape (m, n)
    [O^(1) … O^(K)] = NS([M_t^(1) … M_t^(K)])              one matrix of shape (m, Kn)
    W_{t+1}^(k) = W_t^(k)(1 − ηλ) − η·√(m/n)·O^(k)

Side by side, the layers share left singular vectors: O^(k) = (Σ_j M^(j)M^(j)ᵀ)^(−1/2) M^(k), where each layer by itself would give
(M^(k)M^(k)ᵀ)^(−1/2) M^(k). So K equal layers get the same update as by themselves, only smaller by √K.

The `stack` parameters that follow each other in a group are one problem; those left over at a group's end are a smaller one, and so
are the others of a stack when one has no gradient. The paper stacks two consecutive layers' q, k or v: put those beside each other.
What the paper does not say and is chosen here: the remainder, decoupled decay, Jordan's coefficients by default (the paper's best
results are with Polar Express). No public code is kept.
"""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optiscope.examples.optimizers.newton_schulz import JORDAN, Triple, orthogonalise, require_matrices


def stacks(group: dict[str, Any]) -> list[list[Tensor]]:
    """The parameters of a group, `stack` by `stack`."""
    params, size = group["params"], group["stack"]
    return [params[i : i + size] for i in range(0, len(params), size)]


class TEON(Optimizer):
    """Muon across the layers of a stack.

    State of a parameter: `momentum_buffer` (M).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        stack: int = 2,
        ns_steps: int = 5,
        ns_coefficients: Sequence[Triple] = (JORDAN,),
        eps: float = 1e-7,
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`stack` is K, how many consecutive parameters of a group are orthogonalised as one matrix."""
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "stack": stack,
            "ns_steps": ns_steps, "ns_coefficients": list(ns_coefficients), "eps": eps, "ns_dtype": ns_dtype,
        }  # fmt: skip
        super().__init__(params, defaults)
        require_matrices(self)
        for group in self.param_groups:
            if group["stack"] < 1:
                raise ValueError(f"stack: expected 1 or more, got {group['stack']}")
            for members in stacks(group):
                if len(shapes := {tuple(p.shape) for p in members}) > 1:
                    raise ValueError(
                        f"params: expected one shape in every stack, got {' and '.join(map(str, sorted(shapes)))}; reorder the group"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for members in stacks(group):
                if members := [p for p in members if p.grad is not None]:
                    self._update(members, group)
        return loss

    def _update(self, members: list[Tensor], group: dict[str, Any]) -> None:
        for p in members:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
        unfolded = torch.cat([self.state[p]["momentum_buffer"] for p in members], dim=1)
        o = orthogonalise(unfolded, group["ns_coefficients"], group["ns_steps"], group["eps"], group["ns_dtype"])
        rows, cols = members[0].shape
        for p, part in zip(members, o.split(cols, dim=1), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(part, alpha=-group["lr"] * sqrt(rows / cols))
