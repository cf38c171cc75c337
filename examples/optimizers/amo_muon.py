"""AMO: Muon with its own Newton–Schulz steps for every kind of operator (arXiv 2605.17806).

    M_t = μ·M_{t−1} + (1 − μ)·G_t,   N_t = (1 − μ)·G_t + μ·M_t under Nesterov, else M_t
    O_t = NS(N_t; coefficients of the operator, as many steps as it has)
    W_{t+1} = W_t(1 − ηλ) − η·0.2√max(m, n)·O_t

The paper's idea is that attention and MLP matrices differ in how hard they are to orthogonalise, so that a uniform number of steps
is spent badly: watch the geometry per operator early, then fix each operator's budget for the rest of the training. Here this is
three parts. A recorder watches; the schedule comes from the run; and this class obeys it: a parameter group holds `operator`,
`ns_steps` and `ns_coefficients` (a triple per step, the last one repeats), which are read anew at every step, so that
`optiscope.hooks.apply_schedule` can write them during a training. With one schedule for all groups it is
`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, to the bit.

No code was published, and the paper's mapping from geometry to steps is not in any text that could be reached; nothing of it is
needed here.
"""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import Any

import torch
from torch.optim import Optimizer

from optiscope.examples.optimizers.newton_schulz import JORDAN, Triple, orthogonalise, require_matrices


class AMOMuon(Optimizer):
    """Muon whose Newton–Schulz schedule is a setting of each parameter group.

    State of a parameter: `momentum_buffer` (M).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        operator: str | None = None,
        ns_steps: int = 5,
        ns_coefficients: Sequence[Triple] = (JORDAN,),
        eps: float = 1e-7,
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`operator`, `ns_steps` and `ns_coefficients` are those of groups that bring none of their own."""
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "operator": operator,
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
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                o = orthogonalise(direction, group["ns_coefficients"], group["ns_steps"], group["eps"], group["ns_dtype"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(o, alpha=-group["lr"] * (0.2 * sqrt(max(p.shape))))
        return loss
