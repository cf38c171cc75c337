"""Turbo-Muon: Muon with almost-orthogonal scaling before the iteration (arXiv 2512.04632; the scaling: arXiv 2208.03160).

    N_t = (1 − μ)·G_t + μ·M_t,   M_t = μ·M_{t−1} + (1 − μ)·G_t
    d_i = (Σ_j |(NNᵀ)_ij|)^(−1/2),   X₀ = diag(d)·N                    (N with its shorter side first)
    W_{t+1} = W_t(1 − ηλ) − η·0.2√max(m, n)·NS(X₀)

σ_1(diag(d)N) ≤ 1 for every N, and much closer to 1 than after division by ‖N‖_F; the larger start saves one step of five. The scaling
costs next to nothing, since its Gram matrix is also the first step's: diag(d)·NNᵀ·diag(d). The price is direction: rows are scaled
unequally, so the iteration converges to the polar factor of diag(d)N and not to that of N.

The coefficients are the public code's (thib-s/flash-newton-schulz), made for singular values after this scaling: a schedule made for
σ/‖M‖_F does not fit, so the group's setting has a name of its own, `aol_coefficients`, with as many steps as triples. What differs from
the code: no Triton; and ε, a lower bound of the row sums Σ_j|(NNᵀ)_ij|, which are squares. There it is 1e-7: rows of a norm below
3e-4 start smaller, and their update shrinks with them; here it is 1e-30.
"""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optiscope.examples.optimizers.newton_schulz import Triple, quintic_step, require_matrices

AOL: tuple[Triple, ...] = (
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
)


def aol_orthogonalise(matrix: Tensor, coefficients: Sequence[Triple], eps: float = 1e-30, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Newton–Schulz from X₀ = diag(d)·M, one step per triple, in `dtype`."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if tall else x
    gram = x @ x.T
    d = gram.abs().sum(dim=1, keepdim=True).clamp(min=eps).rsqrt()
    x, gram = d * x, d * gram * d.T
    for step, triple in enumerate(coefficients):
        x = quintic_step(x, x @ x.T if step else gram, triple)
    return x.T if tall else x


class TurboMuon(Optimizer):
    """Muon with AOL scaling, of two-dimensional parameters.

    State of a parameter: `momentum_buffer` (M).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        aol_coefficients: Sequence[Triple] = AOL,
        eps: float = 1e-30,
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`aol_coefficients` act on the singular values of diag(d)·N, one triple per step."""
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "aol_coefficients": list(aol_coefficients), "eps": eps, "ns_dtype": ns_dtype,
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
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                o = aol_orthogonalise(direction, group["aol_coefficients"], group["eps"], group["ns_dtype"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(o, alpha=-group["lr"] * (0.2 * sqrt(max(p.shape))))
        return loss
