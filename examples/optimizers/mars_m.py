"""MARS-M: Muon on variance-reduced gradients (arXiv 2510.21800), in its approximate form.

    C_t = G_t + γ·β/(1 − β)·(G_t − G_{t−1}),   C̃_t = C_t/max(1, ‖C_t‖_F)
    M_t = β·M_{t−1} + (1 − β)·C̃_t
    W_{t+1} = W_t(1 − ηλ) − η·0.2√max(m, n)·NS(M_t)

In the exact form G_{t−1} is the gradient of the last weights on *this* step's batch, which takes a second backward pass. The
approximate one, which is the default of the public code (AGI-Arena/MARS) and the only one here, takes the gradient that the last
step was given. At γ = 0.025, β = 0.95 the factor γβ/(1 − β) is 0.475.

As in the public code the gradient before the first counts as zero, so C_1 = 1.475·G_1, and there is no Nesterov mixing. What differs
from it: `last_grad` is a copy; there it is the gradient's own tensor, which a `zero_grad(set_to_none=False)` overwrites, so that no
difference is left; and ε bounds the norm in Newton–Schulz instead of being added.
"""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optiscope.examples.optimizers.newton_schulz import JORDAN, Triple, orthogonalise, require_matrices


def corrected(gradient: Tensor, last: Tensor, factor: float) -> Tensor:
    """C̃ = C/max(1, ‖C‖_F) with C = G + factor·(G − G_last)."""
    c = gradient + factor * (gradient - last)
    return c / c.norm().clamp(min=1)


class MARSM(Optimizer):
    """Variance-reduced Muon of two-dimensional parameters.

    State of a parameter: `last_grad` (G_t) and `momentum_buffer` (M_t, the Newton–Schulz input).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        gamma: float = 0.025,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        ns_coefficients: Sequence[Triple] = (JORDAN,),
        eps: float = 1e-7,
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`momentum` is β, `gamma` the strength of the correction; at 0 this is Muon with gradients clipped to norm 1."""
        defaults = {
            "lr": lr, "momentum": momentum, "gamma": gamma, "weight_decay": weight_decay,
            "ns_steps": ns_steps, "ns_coefficients": list(ns_coefficients), "eps": eps, "ns_dtype": ns_dtype,
        }  # fmt: skip
        super().__init__(params, defaults)
        require_matrices(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["last_grad"], state["momentum_buffer"] = torch.zeros_like(p), torch.zeros_like(p)
                c = corrected(p.grad, state["last_grad"], group["gamma"] * beta / (1 - beta))
                momentum = state["momentum_buffer"].lerp_(c, 1 - beta)
                state["last_grad"].copy_(p.grad)
                o = orthogonalise(momentum, group["ns_coefficients"], group["ns_steps"], group["eps"], group["ns_dtype"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(o, alpha=-group["lr"] * (0.2 * sqrt(max(p.shape))))
        return loss
