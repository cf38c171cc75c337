"""ROOT: Muon with coefficients for the matrix's shape and without its outliers (arXiv 2511.20626).

    M_t = μ·M_{t−1} + G_t,   N_t = G_t + μ·M_t under Nesterov, else M_t
    t = 90th percentile of |N_t|,   outliers = sign(N_t)·max(|N_t| − t, 0),   B_t = N_t − outliers
    W_{t+1} = W_t(1 − ηλ) − η·0.2√max(m, n)·NS(B_t; coefficients of the shape)

Soft thresholding splits N into outliers and the rest; only the rest is used, the outliers are thrown away. The rest is N with every
entry clipped to ±t, and that is how it is computed here. The coefficients were fitted by the authors for four shapes, with the same
triple at every step; other shapes get Jordan's.

All this is as in the public code (huawei-noah/noah-research, ROOT/examples), the paper writes ROOT without Nesterov. What differs
from the code: the iteration runs in `ns_dtype` instead of the weights' format, and ε bounds the norm in it instead of being added.
A warning from experience with the numbers: the triple of (2048, 2048) lets singular values escape from six steps on.
"""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optiscope.examples.optimizers.newton_schulz import JORDAN, Triple, orthogonalise, require_matrices

# (short side, long side): the public example's COEFF_MAP, as printed there.
OF_SHAPE: dict[tuple[int, int], Triple] = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}

# Added to the percentile in the public code, so that a matrix that is zero in nine of ten entries is not clipped to nothing.
THRESHOLD_EPS = 1e-9


def percentile(x: Tensor, q: float) -> Tensor:
    """The q-th quantile of all entries, linear between neighbours. (torch.quantile refuses more than 2²⁴ of them.)"""
    flat = x.flatten().to(torch.promote_types(x.dtype, torch.float32))
    position = q * (flat.numel() - 1)
    below = int(position)
    low = flat.kthvalue(below + 1).values
    return low.lerp(flat.kthvalue(min(below + 2, flat.numel())).values, position - below)


class ROOT(Optimizer):
    """ROOT of two-dimensional parameters.

    State of a parameter: `momentum_buffer` (M) and `threshold` (t of the last step).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        quantile: float = 0.9,
        ns_steps: int = 5,
        ns_coefficients: Sequence[Triple] | None = None,
        eps: float = 1e-7,
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`ns_coefficients` are for all shapes; by default every shape has its own."""
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "quantile": quantile, "ns_steps": ns_steps,
            "ns_coefficients": None if ns_coefficients is None else list(ns_coefficients), "eps": eps, "ns_dtype": ns_dtype,
        }  # fmt: skip
        super().__init__(params, defaults)
        require_matrices(self)

    def coefficients(self, shape: Sequence[int], group: dict[str, Any]) -> list[Triple]:
        """What a matrix of this shape is orthogonalised with; the last triple repeats."""
        return group["ns_coefficients"] or [OF_SHAPE.get((min(shape), max(shape)), JORDAN)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            mu = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].mul_(mu).add_(p.grad)
                direction = p.grad.add(momentum, alpha=mu) if group["nesterov"] else momentum
                t = state["threshold"] = percentile(direction.abs(), group["quantile"]) + THRESHOLD_EPS
                clipped = direction.clamp(-t, t)
                o = orthogonalise(clipped, self.coefficients(p.shape, group), group["ns_steps"], group["eps"], group["ns_dtype"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(o, alpha=-group["lr"] * (0.2 * sqrt(max(p.shape))))
        return loss
