"""Stand-ins for optimizers that are published as files to copy: state, names and arithmetic are theirs, the code is not.

Each notes in `given` what the iteration of every parameter was given, for the tests to compare with; the watched copy has a dictionary of its own.
"""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from watching.generator import JORDAN, POLAR_EXPRESS


def five_steps(matrix: Tensor, steps: int = 5) -> Tensor:
    """zeropower_via_newtonschulz5 as it is copied from file to file."""
    a, b, c = JORDAN[0]
    x = matrix.bfloat16()
    x = x.mT if matrix.size(-2) > matrix.size(-1) else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.size(-2) > matrix.size(-1) else x


class Noting(Optimizer):
    """What all stand-ins share: what was given, and AdamW for those parameters that a class leaves to it."""

    def __init__(self, params: Iterable[Any], **defaults: Any) -> None:
        self.given: dict[int, Tensor] = {}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            self.of_group(group)

    def of_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            self.one(p, self.state[p], group)

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def note(self, p: Tensor, given: Tensor) -> Tensor:
        self.given[id(p)] = given.clone()
        return given

    def momentum(self, p: Any, state: dict[str, Any], mu: float, *, ema: bool) -> Tensor:
        m: Tensor = state.setdefault("momentum_buffer", torch.zeros_like(p.grad))
        return m.lerp_(p.grad, 1 - mu) if ema else m.mul_(mu).add_(p.grad)

    def adamw(self, p: Any, state: dict[str, Any], lr: float, decay: float, names: tuple[str, str]) -> None:
        state["step"] = state.get("step", 0) + 1
        m, v = (state.setdefault(name, torch.zeros_like(p.grad)) for name in names)
        m.lerp_(p.grad, 0.1)
        v.lerp_(p.grad.square(), 0.05)
        p.mul_(1 - lr * decay).sub_(m / (1 - 0.9 ** state["step"]) / ((v / (1 - 0.95 ** state["step"])).sqrt() + 1e-8), alpha=lr)


class KellerJordanMuon(Noting):
    """As in modded-nanogpt: EMA, Nesterov written into the gradient, √max(1, m/n)."""

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        m = self.momentum(p, state, group["momentum"], ema=True)
        given = self.note(p, p.grad.lerp_(m, group["momentum"]))
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(five_steps(given), alpha=-group["lr"] * max(1, p.size(-2) / p.size(-1)) ** 0.5)


class MoonlightMuon(Noting):
    """toy_train.Muon: one group, whose parameters are told apart by state["use_muon"]; `wd`; 0.2·√max(m, n)."""

    def __init__(self, muon: Iterable[Tensor], adamw: Iterable[Tensor]) -> None:
        muon, adamw = list(muon), list(adamw)
        super().__init__(
            [*muon, *adamw], lr=0.02, wd=0.1, momentum=0.95, nesterov=True, ns_steps=5, adamw_betas=(0.9, 0.95), adamw_eps=1e-8
        )
        for p in (*muon, *adamw):
            self.state[p]["use_muon"] = any(p is one for one in muon)

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state["use_muon"]:
            self.adamw(p, state, group["lr"], group["wd"], ("moment1", "moment2"))
            return
        m = self.momentum(p, state, group["momentum"], ema=False)
        output = five_steps(self.note(p, p.grad.add(m, alpha=group["momentum"])), group["ns_steps"])
        p.data.mul_(1 - group["lr"] * group["wd"])
        p.data.add_(output, alpha=-group["lr"] * 0.2 * sqrt(max(p.shape)))


class AuthorsAdaMuon(Noting):
    """The authors': the sign of the Nesterov momentum is iterated, a second moment of O, kept flat; groups by size with an update buffer."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        params = list(params)
        sizes = dict.fromkeys(p.numel() for p in params)
        groups = [
            {"params": [p for p in params if p.numel() == n], "update_buffer": torch.empty(1, n, dtype=torch.bfloat16)} for n in sizes
        ]
        super().__init__(groups, lr=0.02, weight_decay=0.01, momentum=0.95, nesterov=True, ns_steps=5, eps=1e-8)

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        m = self.momentum(p, state, group["momentum"], ema=True)
        g = five_steps(self.note(p, torch.sign(p.grad.lerp_(m, group["momentum"]))), group["ns_steps"]).flatten()
        v = state.setdefault("v_buffer", torch.zeros_like(g))
        v.mul_(group["momentum"]).addcmul_(g, g, value=1 - group["momentum"])
        g = g.div(v.sqrt().add(group["eps"]))
        g.mul_(0.2 * sqrt(p.numel()) / (g.norm() + group["eps"]))
        group["update_buffer"][0].copy_(g)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(group["update_buffer"][0].view_as(p), alpha=-group["lr"])


class LionsScion(Noting):
    """LIONS-EPFL's Scion: momentum α is the weight of the gradient; W ← (1 − η)W − η·s·√(m/n)·O."""

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        m = state.setdefault("momentum_buffer", torch.zeros_like(p.grad))
        m.mul_(1 - group["momentum"]).add_(p.grad, alpha=group["momentum"])
        self.move(p, self.note(p, m), group)

    def move(self, p: Any, given: Tensor, group: dict[str, Any]) -> None:
        update = group["scale"] * (five_steps(given.reshape(len(given), -1)).view(given.shape) * sqrt(p.shape[0] / p.shape[1]))
        p.data.mul_(1 - group["lr"])
        p.data.add_(update, alpha=-group["lr"])


class LionsScionLight(LionsScion):
    """Its light one: the momentum is p.grad, which the backward adds to and the step shrinks."""

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        self.move(p, self.note(p, p.grad), group)
        p.grad.mul_(1 - group["momentum"])


class HyperballMuon(KellerJordanMuon):
    """‖W‖_F stays what it was at first: the step is of the length η‖W₀‖_F, and W is brought back to the sphere."""

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        radius = state.setdefault("radius", p.norm().clone())
        m = self.momentum(p, state, group["momentum"], ema=True)
        output = five_steps(self.note(p, p.grad.lerp(m, group["momentum"]))).to(p.dtype)
        p.sub_(output * (group["lr"] * radius / output.norm()))
        p.mul_(radius / p.norm())


class MuownLike(KellerJordanMuon):
    """Rows are a magnitude times a direction: Muon on the directions, Adam on the magnitudes."""

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        size = p.norm(dim=1, keepdim=True)
        direction = p / size
        along = (p.grad * direction).sum(1, keepdim=True)
        across = (p.grad - along * direction) * size
        state["step"] = state.get("step", 0) + 1
        m = state.setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(across, 0.1)
        first, second = (state.setdefault(name, torch.zeros_like(size)) for name in ("exp_avg", "exp_avg_sq"))
        first.lerp_(along, 0.1)
        second.lerp_(along.square(), 0.05)
        adam = first / (1 - 0.9 ** state["step"]) / ((second / (1 - 0.95 ** state["step"])).sqrt() + 1e-8)
        direction = direction - group["lr"] * five_steps(self.note(p, m)).to(p.dtype)
        p.copy_((size - 0.001 * adam) * direction / direction.norm(dim=1, keepdim=True))


class AuroraLike(KellerJordanMuon):
    """Updates of tall matrices are brought to rows of one norm."""

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        m = self.momentum(p, state, group["momentum"], ema=True)
        output = five_steps(self.note(p, p.grad.lerp(m, group["momentum"]))).to(p.dtype)
        if p.shape[0] > p.shape[1]:
            output = output * (sqrt(p.shape[1] / p.shape[0]) / output.norm(dim=1, keepdim=True))
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(output, alpha=group["lr"])


class MuonPlus(KellerJordanMuon):
    """Muon+: the output is brought to the norm √min(m, n) that an orthogonal matrix has."""

    def one(self, p: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        m = self.momentum(p, state, group["momentum"], ema=True)
        output = five_steps(self.note(p, p.grad.lerp(m, group["momentum"]))).to(p.dtype)
        p.sub_(output * (sqrt(min(p.shape)) / output.norm()), alpha=group["lr"])


class ClippingMuon(KellerJordanMuon):
    """Kimi K2's MuonClip: once all is updated, heads of q and k whose largest logit is over τ are multiplied by √(τ/logit).

    `logits` are set before a step, one for every head; `how` they are multiplied differs from file to file.
    """

    def __init__(self, params: Iterable[Any], attention: list[tuple[Tensor, Tensor]], how: str, **defaults: Any) -> None:
        self.attention, self.how = attention, how
        self.logits: list[Tensor | None] = [None] * len(attention)
        super().__init__(params, qk_clip_threshold=100.0, **defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        for pair, logits in zip(self.attention, self.logits, strict=True):
            if logits is not None:
                for weight in pair:
                    self.clip(weight, (100 / logits.clamp_min(100)).sqrt())

    def clip(self, weight: Tensor, of_heads: Tensor) -> None:
        size, cols = len(weight) // len(of_heads), weight.shape[1]
        if self.how == "heads":
            weight.view(len(of_heads), size, cols).mul_(of_heads[:, None, None])
        elif self.how == "copied":
            turned = weight.data.T.reshape(cols, len(of_heads), size) * of_heads[:, None]
            weight.data.copy_(turned.reshape(cols, -1).T.clone())
        elif self.how == "slices of columns":
            for i, factor in enumerate(of_heads.tolist()):
                if factor < 1:
                    weight.data[:, i * cols // len(of_heads) : (i + 1) * cols // len(of_heads)] *= factor
        elif self.how == "whole":
            weight.mul_(float(of_heads.min()))
        elif self.how == "elsewhere":
            weight.data = (weight.view(len(of_heads), size, cols) * of_heads[:, None, None]).reshape(weight.shape)


@torch.compile(dynamic=False, fullgraph=True, backend="eager")
def muon_step_fused(
    g: Tensor, w: Tensor, m: Tensor, second: Tensor, mu: Tensor, lr: Tensor, wd: Tensor, beta2: Tensor, steps: int, axis: int
) -> Tensor:
    """nanochat's, of all matrices of a group: settings are tensors, so that nothing is compiled again where they change."""
    m.lerp_(g, 1 - mu)
    g = g.lerp_(m, mu)
    x = g.bfloat16()
    target = x.float().norm(dim=(-2, -1), keepdim=True) / x.size(-2) ** 0.5
    x = given = x * (target / x.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)).to(x.dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    tall = g.size(-2) > g.size(-1)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    g = x.to(w.dtype)
    g = g * (min(g.size(-2), g.size(-1)) ** 0.5 / g.float().norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))
    mean = g.square().mean(dim=axis, keepdim=True)
    count = g.size(axis)
    norm = (mean.sum(dim=(-2, -1), keepdim=True) * count).sqrt()
    second.lerp_(mean, 1 - beta2)
    factor = second.clamp_min(1e-10).rsqrt()
    g = g * (factor * (norm / (mean * count * factor.square()).sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-10)))
    w.sub_(lr * g + lr * wd * w * ((g * w) >= 0))
    return given


class NanochatMuonAdamW(Noting):
    """nanochat.optim.MuonAdamW on one process: groups of one shape and of a `kind`, one state of all matrices under the first."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        self.settings = {name: torch.tensor(0.0) for name in ("momentum", "lr", "wd", "beta2")}

    def of_group(self, group: dict[str, Any]) -> None:
        params = group["params"]
        if group["kind"] == "adamw":
            for p in params:
                self.adamw(p, self.state[p], group["lr"], group["weight_decay"], ("exp_avg", "exp_avg_sq"))
            return
        state, g, w = self.state[params[0]], torch.stack([p.grad for p in params]), torch.stack(list(params))
        tall = params[0].shape[0] >= params[0].shape[1]
        state.setdefault("momentum_buffer", torch.zeros_like(w))
        state.setdefault("second_momentum_buffer", torch.zeros_like(w[..., :1] if tall else w[:, :1]))
        now = {"momentum": group["momentum"], "wd": group["weight_decay"], "beta2": group["beta2"]}
        now["lr"] = group["lr"] * max(1.0, params[0].shape[0] / params[0].shape[1]) ** 0.5
        for name, value in now.items():
            self.settings[name].fill_(value)
        given = muon_step_fused(
            g, w, state["momentum_buffer"], state["second_momentum_buffer"], *(self.settings[name] for name in ("momentum", "lr", "wd", "beta2")),
            group["ns_steps"], -1 if tall else -2,
        )  # fmt: skip
        for p, one in zip(params, given, strict=True):
            self.note(p, one)
        torch._foreach_copy_(params, list(w.unbind(0)))


class SophiaG(Optimizer):
    """Liuhong99's: the Hessian is updated by a call of its own, the batch's size is an argument of the step."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, rho: float = 0.04, weight_decay: float = 0.1) -> None:
        super().__init__(
            params, {"lr": lr, "betas": (0.965, 0.99), "rho": rho, "weight_decay": weight_decay, "maximize": False, "capturable": False}
        )

    def of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), hessian=torch.zeros_like(p))
        return state

    @torch.no_grad()
    def update_hessian(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.of(p)["hessian"].mul_(group["betas"][1]).addcmul_(p.grad, p.grad, value=1 - group["betas"][1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, bs: int = 5120) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.of(p)
                state["step"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                m = state["exp_avg"].mul_(group["betas"][0]).add_(p.grad, alpha=1 - group["betas"][0])
                ratio = (m.abs() / (group["rho"] * bs * state["hessian"] + 1e-15)).clamp(None, 1)
                p.addcmul_(m.sign(), ratio, value=-group["lr"])


SophiaG.__module__ = "sophia"
