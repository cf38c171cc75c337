"""AdaMuon: Muon with an elementwise second moment of the orthogonalised update and a fixed update size, in both published forms.

The first version of the paper (Algorithm 1), `sign=False`:

    M_t = β·M_{t−1} + (1 − β)·G_t,   O_t = NS(M_t)
    V_t = β₂·V_{t−1} + (1 − β₂)·O_t²,   V̂_t = V_t/(1 − β₂ᵗ),   Ô_t = O_t/(√V̂_t + ε)
    W_{t+1} = W_t(1 − ηλ) − η·0.2/(RMS(Ô_t) + ε)·Ô_t

Later versions and the authors' code, `sign=True`: the iteration is given signs, V has the momentum's own β and no bias correction:

    N_t = (1 − β)·G_t + β·M_t,   O_t = NS(sign N_t)
    V_t = β·V_{t−1} + (1 − β)·O_t²,   Ô_t = O_t/(√V_t + ε)
    W_{t+1} = W_t(1 − ηλ) − η·0.2√(mn)/(‖Ô_t‖_F + ε)·Ô_t

Either way RMS(ΔW)/η is 0.2 up to ε, decay aside, whatever the iteration left undone; and Ô is no longer orthogonal.

What differs from the paper: nothing in `sign=False`; its Eq. 1 sums (βM + G) where Algorithm 1, followed here, averages, which the
iteration does not see. What differs from the authors' code: V is kept in the parameter's shape, nothing is distributed, and ε bounds
the norm in Newton–Schulz instead of being added. NVIDIA's AdaMuon is another optimizer: it has no alignment of sizes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optiscope.examples.optimizers.newton_schulz import JORDAN, Triple, orthogonalise, require_matrices


def aligned(direction: Tensor, eps: float, sign: bool) -> Tensor:
    """Ô scaled to RMS 0.2; ε enters beside the RMS in the first version, beside the Frobenius norm in the later ones."""
    norm, root = direction.norm(), direction.numel() ** 0.5
    return direction * (0.2 * root / (norm + eps)) if sign else direction * (0.2 / (norm / root + eps))


class AdaMuon(Optimizer):
    """AdaMuon of two-dimensional parameters.

    State of a parameter: `step`, `momentum_buffer` (M) and `second_momentum_buffer` (V, of the orthogonalised update).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        sign: bool = False,
        ns_steps: int = 5,
        ns_coefficients: Sequence[Triple] = (JORDAN,),
        ns_eps: float = 1e-7,
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`momentum` is β; `beta2` is read by the first version only; `ns_eps` is the iteration's."""
        defaults = {
            "lr": lr, "momentum": momentum, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "sign": sign,
            "ns_steps": ns_steps, "ns_coefficients": list(ns_coefficients), "ns_eps": ns_eps, "ns_dtype": ns_dtype,
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
            beta, eps, sign = group["momentum"], group["eps"], group["sign"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["momentum_buffer"], state["second_momentum_buffer"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - beta)
                beta2 = beta if sign else group["beta2"]
                correction = 1 if sign else 1 - beta2 ** state["step"]
                direction = p.grad.lerp(momentum, beta).sign() if sign else momentum
                o = orthogonalise(direction, group["ns_coefficients"], group["ns_steps"], group["ns_eps"], group["ns_dtype"]).to(p.dtype)
                v = state["second_momentum_buffer"].mul_(beta2).addcmul_(o, o, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(aligned(o / ((v / correction).sqrt() + eps), eps, sign), alpha=-group["lr"])
        return loss
