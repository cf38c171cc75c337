"""CASPR: Combining AxeS PReconditioners (Duvvuri, Devvrit, Anil, Hsieh, Dhillon; ICLR 2024), for weight matrices.

Shampoo preconditions G by the Kronecker product L^(−1/4) ⊗ R^(−1/4); CASPR by the square of the mean of the two factors on
their own axes, ((L^(−1/4) ⊗ I + I ⊗ R^(−1/4))/2)², on row-major vec(G). Multiplied out:

    L_t = β₂·L_{t−1} + (1 − β₂)·GGᵀ        R_t = β₂·R_{t−1} + (1 − β₂)·GᵀG        M_t = β₁·M_{t−1} + (1 − β₁)·G
    U_t = (L^(−1/2) M + 2·L^(−1/4) M R^(−1/4) + M R^(−1/2))/4
    W_{t+1} = W_t(1 − ηλ) − η·U_t

The exponents are total powers of −1/2 of a quantity quadratic in G, so U does not change when G is scaled. For the very first
gradient all three terms are its polar factor.

What is chosen here and not taken from the paper: L and R are exponential moving averages with Adam's bias correction, as is M
(the paper starts from sums of GGᵀ and GᵀG); εI is added to L and R where their roots are taken and not kept in them; the roots
are taken at every step, by eigendecomposition; the size of the update is not grafted from another optimizer.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def inverse_fourth_root(factor: Tensor, eps: float) -> Tensor:
    """(A + εI)^(−1/4) of a symmetric positive semi-definite matrix; rounding below zero is taken for zero."""
    eigenvalues, vectors = torch.linalg.eigh(factor)
    return (vectors * (eigenvalues.clamp(min=0) + eps) ** -0.25) @ vectors.mT


def precondition(gradient: Tensor, left: Tensor, right: Tensor, eps: float) -> Tensor:
    """(L^(−1/2) G + 2·L^(−1/4) G R^(−1/4) + G R^(−1/2))/4, with L (m, m) and R (n, n) for G of shape (m, n)."""
    along_rows, along_columns = inverse_fourth_root(left, eps), inverse_fourth_root(right, eps)

    def mean_of_axes(x: Tensor) -> Tensor:
        return (along_rows @ x + x @ along_columns) / 2

    # A square: applied twice. Each of the three terms falls out with its coefficient.
    return mean_of_axes(mean_of_axes(gradient))


class CASPR(Optimizer):
    """CASPR on two-dimensional parameters.

    State of a parameter: `step`, `exp_avg` (M), `left` (L, rows × rows) and `right` (R, columns × columns), as the averages
    stand, without bias correction and without ε.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(
                    f"params: CASPR preconditions matrices, got a parameter of shape {tuple(p.shape)}; give it to another optimizer"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    rows, columns = p.shape
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["left"], state["right"] = p.new_zeros(rows, rows), p.new_zeros(columns, columns)
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["left"].lerp_(p.grad @ p.grad.mT, 1 - beta2)
                state["right"].lerp_(p.grad.mT @ p.grad, 1 - beta2)
                correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
                update = precondition(state["exp_avg"], state["left"] / correction2, state["right"] / correction2, group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] / correction1)
        return loss
