"""1-bit Adam (Tang et al., ICML 2021, arXiv 2102.02888, Algorithm 1), in one process.

Up to step T_w (`freeze_step`) it is Adam. Then v stays what it is, and what workers would exchange is the momentum, compressed to
one bit per entry and one scale per tensor, with the compression's error fed back into the next step:

    m_t = β₁·m̄_{t−1} + (1 − β₁)·g_t
    m̄_t = C(m_t + e_{t−1}),   e_t = m_t + e_{t−1} − m̄_t,   C(x) = mean|x|·sign(x), sign(0) = 1
    W_{t+1} = W_t(1 − ηλ) − η·m̂_t/(√v̂ + ε),   v of step T_w

m̄ and not m is what the next step starts from. With a single worker the server's own compression changes nothing, since
C(C(x)) = C(x), so it is left out; so is all communication.

What differs from the paper and from DeepSpeed's (which was removed there; its last version is 0.19.6): m and v are bias-corrected
as in Adam, so that the warm-up is `torch.optim.Adam` to the bit, v with the correction of the step at which it froze; DeepSpeed
keeps the error flat and padded (`worker_error`, `server_error`), here it has the parameter's shape; the scale is mean|x|, DeepSpeed's is RMS(x).
"""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def compress(x: Tensor) -> Tensor:
    """mean|x|·sign(x) with sign(0) = 1: two values, so one bit per entry, and a scale."""
    scale = x.abs().mean()
    return torch.where(x >= 0, scale, -scale)


class OneBitAdam(Optimizer):
    """1-bit Adam of parameters of any shape.

    State of a parameter: `step`, `exp_avg` (m; compressed, m̄, after the warm-up), `exp_avg_sq` (v, frozen after the warm-up)
    and `error` (e), which is there once something was compressed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        freeze_step: int = 1000,
    ) -> None:
        """`freeze_step` is T_w: the number of steps of plain Adam, of which v needs about 1/(1 − β₂) to settle."""
        if freeze_step < 1:
            raise ValueError(f"freeze_step: expected 1 or more, since v is frozen as Adam leaves it; got {freeze_step}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "freeze_step": freeze_step})

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
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                momentum = state["exp_avg"].lerp_(p.grad, 1 - beta1)
                if state["step"] <= group["freeze_step"]:
                    state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                else:
                    wanted = momentum + state["error"] if "error" in state else momentum.clone()
                    momentum.copy_(compress(wanted))
                    state["error"] = wanted - momentum
                correction1 = 1 - beta1 ** state["step"]
                correction2 = 1 - beta2 ** min(state["step"], group["freeze_step"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # The order of operations is that of torch.optim.Adam.
                denominator = (state["exp_avg_sq"].sqrt() / sqrt(correction2)).add_(group["eps"])
                p.addcdiv_(momentum, denominator, value=-group["lr"] / correction1)
        return loss
