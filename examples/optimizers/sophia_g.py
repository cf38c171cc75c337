"""Sophia-G (Liu, Li, Hall, Liang, Ma; ICLR 2024, arXiv 2305.14342, Algorithms 2 and 3): clipped steps over a Hessian diagonal.

    m_t = β₁·m_{t−1} + (1 − β₁)·g_t
    h_t = β₂·h_{t−1} + (1 − β₂)·ĥ_t   where (t − 1) mod k = 0, else h_{t−1};   ĥ = B·ĝ⊙ĝ
    W_{t+1} = W_t(1 − ηλ) − η·clip(m_t/max(γ·h_t, ε), 1)

ĥ is the Gauss–Newton–Bartlett estimate: ĝ is the gradient of the *mean* loss over B labels that are drawn from the model's own
softmax. B counts the independent draws, which in a language model are tokens, not sequences. Neither m nor h is bias-corrected.

The optimizer cannot draw labels; the training does, and hands the gradient over:

    for x, y in data:
        if optimizer.hessian_due:  # (t − 1) mod k = 0, t the step that comes next
            logits = model(x)
            drawn = torch.distributions.Categorical(logits=logits).sample()
            F.cross_entropy(logits.flatten(0, -2), drawn.flatten()).backward()
            optimizer.update_hessian(tokens=drawn.numel())
            optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()

What differs: the paper's condition t mod k = 1 never holds for k = 1, (t − 1) mod k = 0 says the same for every other k. The
authors' code keeps the average of ĝ⊙ĝ, multiplies by B in the step, and clips |m|/(ρ·B·h + 1e-15); with ρ = γ and a constant B that
is this optimizer but for the ε.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class SophiaG(Optimizer):
    """Sophia-G on parameters of any shape.

    State of a parameter: `step`, `exp_avg` (m) and `hessian` (h, with B in it).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        every: int = 10,
    ) -> None:
        """`every` is k. `gamma` is to be set so that a tenth to a half of the coordinates are not clipped."""
        if every < 1:
            raise ValueError(f"every: expected 1 or more steps between two estimates of the Hessian, got {every}")
        super().__init__(params, {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay})
        self.every = every

    @property
    def hessian_due(self) -> bool:
        """Whether the step that comes next, t, is one with (t − 1) mod k = 0."""
        return max((state["step"] for state in self.state.values()), default=0) % self.every == 0

    @torch.no_grad()
    def update_hessian(self, tokens: int) -> None:
        """h ← β₂·h + (1 − β₂)·B·ĝ⊙ĝ, from the gradients of the mean loss over B = `tokens` labels drawn from the model."""
        for group in self.param_groups:
            beta2 = group["betas"][1]
            for p in group["params"]:
                if p.grad is not None:
                    self._state_of(p)["hessian"].mul_(beta2).addcmul_(p.grad, p.grad, value=(1 - beta2) * tokens)

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
                state = self._state_of(p)
                state["step"] += 1
                momentum = state["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
                curvature = (group["gamma"] * state["hessian"]).clamp_(min=group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((momentum / curvature).clamp_(-1, 1), alpha=-group["lr"])
        return loss

    def _state_of(self, p: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), hessian=torch.zeros_like(p))
        return state
