"""ARO: adaptively rotated optimization, for weight matrices. Written to be read beside arXiv 2602.09006.

    M_t = μ·M_{t−1} + (1 − μ)·G_t
    R_t = QR(M_t f(R_{t−1}ᵀM_t)ᵀ)
    W_{t+1} = W_t(1 − ηλ) − η·R_t f(R_tᵀM_t)

f is the base optimizer's direction, R an orthogonal matrix: the coordinate system that f works in, R_0 = I. With f the
normalisation of rows, one step of R is one step of orthogonal iteration on MMᵀ with rescaled columns. So for a momentum that
stands still R tends to M's left singular vectors U, and the update to U·f(UᵀM) = UVᵀ, which is Muon's.

What is chosen here and not taken from the paper: f keeps no state of its own (row normalisation or sign); tall matrices are
transposed, so that R is of the shorter side; the decay is decoupled; the update is not rescaled (row normalisation gives
RMS 1/√max(m, n), the size of an exact polar factor). Nothing is orthogonalised by an iteration, so no residual goes with it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer


def row_normalise(x: Tensor) -> Tensor:
    """Every row divided by its length; zero rows stay zero."""
    return F.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)


BASES: dict[str, Callable[[Tensor], Tensor]] = {"row": row_normalise, "sign": torch.sign}


def next_rotation(momentum: Tensor, rotation: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    """R_t = QR(M f(R_{t−1}ᵀM)ᵀ), shape (m, m) for M of shape (m, n). QR runs in float32 or wider."""
    target = momentum @ base(rotation.mT @ momentum).mT
    return torch.linalg.qr(target.to(torch.promote_types(target.dtype, torch.float32))).Q.to(target.dtype)


def rotated_direction(momentum: Tensor, rotation: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    """R f(RᵀM), shape of M."""
    return rotation @ base(rotation.mT @ momentum)


class ARO(Optimizer):
    """Adaptively rotated optimization of two-dimensional parameters.

    State of a parameter: `momentum_buffer` (M, its shape) and `rotation` (R, square, of its shorter side).
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, base: str = "row", weight_decay: float = 0.0
    ) -> None:
        """`base` names f: "row" (row normalisation) or "sign"."""
        if base not in BASES:
            raise ValueError(f"base: expected one of {', '.join(BASES)}; got {base!r}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "base": base, "weight_decay": weight_decay})
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(f"params: ARO rotates matrices, got a parameter of shape {tuple(p.shape)}; give it to another optimizer")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            base = BASES[group["base"]]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                    state["rotation"] = torch.eye(min(p.shape), dtype=p.dtype, device=p.device)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                tall = p.shape[0] > p.shape[1]
                momentum = state["momentum_buffer"].mT if tall else state["momentum_buffer"]
                state["rotation"] = next_rotation(momentum, state["rotation"], base)
                direction = rotated_direction(momentum, state["rotation"], base)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction.mT if tall else direction, alpha=-group["lr"])
        return loss
