"""Stand-ins for optimizers that orthogonalise, and Dion; see `standins`."""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from contract.standins import StandIn, reported_as

Triples = list[tuple[float, float, float]]

JORDAN: Triples = [(3.4445, -4.7750, 2.0315)]
YOU: Triples = [
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
]  # fmt: skip
SPEEDRUN: Triples = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
# Two of Emerging-Optimizers' lists.
COEFFICIENTS = {"simple": JORDAN, "quintic": YOU}


def iterate(x: Tensor, triples: Triples, divisor: float, eps: float) -> Tensor:
    """X ← aX + (bA + cA²)X with A = XXᵀ on the short side, from X₀ = M/(divisor·‖M‖_F + eps); one matrix or a batch."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * divisor + eps)
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


@reported_as("dion.polar_express", "polar_express")
def polar_express(matrices: Tensor, epsilon: float = 1e-6) -> Tensor:
    """dion's default."""
    return iterate(matrices.bfloat16(), SPEEDRUN, 1.02, epsilon)


@reported_as("dion.newton_schulz_triton", "zeropower_via_newtonschulz5")
def five_steps(matrices: Tensor, epsilon: float = 1e-7) -> Tensor:
    """dion's other one."""
    return iterate(matrices.bfloat16(), YOU, 1.0, epsilon)


five_steps.__name__ = "zeropower_via_newtonschulz5"


def zeropower_via_newtonschulz5(matrix: Tensor, steps: int) -> Tensor:
    """That of MARS-M, which is Moonlight's."""
    return iterate(matrix.bfloat16(), JORDAN * steps, 1.0, 1e-7)


def newton_schulz(matrix: Tensor, steps: int, coefficient_type: str) -> Tensor:
    """Emerging-Optimizers', in float32 (the library's default is bfloat16 within); these two types are cycled."""
    triples = COEFFICIENTS[coefficient_type]
    return iterate(matrix, [triples[i % len(triples)] for i in range(steps)], 1.0, 1e-7)


@reported_as("dion.dion", "Dion")
class Dion(StandIn):
    """microsoft/dion: low rank with error feedback; `momentum`, `Q` (columns × rank), scale √(rows/columns), decay by the unscaled learning
    rate. Left out: the randomised QR, transposed shards, AdamW and Lion."""

    def __init__(self, params: Iterable[Any], lr: float = 0.01, mu: float = 0.95, weight_decay: float = 0.0, rank: int = 4) -> None:
        settings = {"lr": lr, "mu": mu, "beta1": 0.9, "beta2": 0.95, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "epsilon": 1e-8, "algorithm": "dion", "step": 0})
        self.rank = rank

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            generator = torch.Generator().manual_seed(0)
            state.update(momentum=torch.zeros_like(p), Q=torch.randn(p.shape[1], min(self.rank, *p.shape), generator=generator))
        momentum = state["momentum"].add_(g)
        left = torch.linalg.qr(momentum @ state["Q"]).Q
        right = momentum.mT @ left
        momentum.sub_(left @ right.mT, alpha=1 - group["mu"])
        state["Q"].copy_(nn.functional.normalize(right, dim=0))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(left @ state["Q"].mT, alpha=group["lr"] * sqrt(p.shape[0] / p.shape[1]))


@reported_as("dion.muon", "Muon")
class DionMuon(Optimizer):
    """microsoft/dion: Muon. `momentum` = μM + g, made when the optimizer is; NS input M, or g + μM under Nesterov, cast to bfloat16 and stacked by
    shape; NS function and its ε; `adjust_lr` spectral_norm √(rows/columns), rms_norm 0.2√max; `algorithm` "adamw" with `momentum` and
    `variance`; decay by the group's own learning rate. Left out: sharding, heads and blocks of rows, cautious decay, Lion."""

    name = "muon"

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, mu: float = 0.95, weight_decay: float = 0.01, nesterov: bool = False,
        adjust_lr: str | None = "spectral_norm", newton_schulz_func: Callable[..., Tensor] | None = None,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "mu": mu, "muon_beta2": 0.95, "beta1": 0.9, "beta2": 0.95, "weight_decay": weight_decay, "nesterov": nesterov}
        defaults |= {"adjust_lr": adjust_lr, "flatten": False, "epsilon": 1e-8, "cautious_wd": False, "algorithm": self.name, "step": 0}
        super().__init__(params, defaults)
        self._newton_schulz_func = newton_schulz_func or polar_express
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)
                if group["algorithm"] == "adamw":
                    self.state[p]["variance"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            group["step"] += 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] == "adamw":
                for p in parameters:
                    self.adamw(p, p.grad, self.state[p], group)
                continue
            for shape in dict.fromkeys(p.shape for p in parameters):
                self.batch([p for p in parameters if p.shape == shape], group)

    def batch(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """All parameters of one shape, in one call of the NS function."""
        inputs = []
        for p in parameters:
            momentum = self.state[p]["momentum"].mul_(group["mu"]).add_(p.grad)
            inputs.append((momentum * group["mu"] + p.grad if group["nesterov"] else momentum).bfloat16())
        rows, cols = parameters[0].shape[-2:]
        scale = {None: 1.0, "spectral_norm": sqrt(rows / cols), "rms_norm": 0.2 * sqrt(max(rows, cols))}[group["adjust_lr"]]
        outputs = self._newton_schulz_func(torch.stack(inputs), epsilon=torch.tensor(group["epsilon"]))
        for p, output in zip(parameters, outputs, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(self.normalise(output, self.state[p], group), alpha=group["lr"] * scale)

    def normalise(self, output: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What follows the iteration: nothing in Muon."""
        return output

    def adamw(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """AdamW, for the groups that ask for it."""
        beta1, beta2 = group["beta1"], group["beta2"]
        m, v = state["momentum"].lerp_(g, 1 - beta1), state["variance"].lerp_(g * g, 1 - beta2)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (v / (1 - beta2 ** group["step"])).sqrt() + group["epsilon"]
        p.sub_(m / (1 - beta1 ** group["step"]) / denominator, alpha=group["lr"])


@reported_as("dion.normuon", "NorMuon")
class DionNorMuon(DionMuon):
    """microsoft/dion: NorMuon. As its Muon, then `variance_neuron` [rows, 1], β₂ 0.95, denominator √v + 1e-8, norm restored."""

    name = "normuon"

    def normalise(self, output: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        o = output.float()
        beta2, start = group["muon_beta2"], torch.zeros(*o.shape[:-1], 1)
        v = state.setdefault("variance_neuron", start).lerp_(o.square().mean(-1, keepdim=True), 1 - beta2)
        turned = o / (v.sqrt() + 1e-8)
        return turned * (o.norm() / turned.norm())


@reported_as("emerging_optimizers.orthogonalized_optimizers.muon", "Muon")
class NvidiaMuon(StandIn):
    """NVIDIA Emerging-Optimizers: Muon. `momentum_buffer`, an average; NS settings, Nesterov mixing and the kind of decay as attributes; scale
    √max(rows, columns)·extra or two others."""

    def __init__(
        self, params: Iterable[Any], lr: float = 3e-4, momentum: float = 0.95, weight_decay: float = 0.01, *, nesterov: bool = False,
        weight_decay_method: str = "decoupled", coefficient_type: str = "quintic", num_ns_steps: int = 5, scale_mode: str = "spectral",
        extra_scale_factor: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.nesterov, self.weight_decay_method = nesterov, weight_decay_method
        self.coefficient_type, self.num_ns_steps = coefficient_type, num_ns_steps
        self.scale_mode, self.extra_scale_factor = scale_mode, extra_scale_factor
        self.scaled_orthogonalize_fn = lambda matrix: self.scaled(self.orthogonal(matrix))

    def orthogonal(self, matrix: Tensor) -> Tensor:
        return newton_schulz(matrix, self.num_ns_steps, self.coefficient_type)

    def scaled(self, output: Tensor) -> Tensor:
        rows, cols = output.shape
        modes = {"spectral": sqrt(max(rows, cols)), "shape_scaling": sqrt(max(1, rows / cols)), "unit_rms_norm": sqrt(rows / cols)}
        return output * modes[self.scale_mode] * self.extra_scale_factor

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(p))
        match self.weight_decay_method:
            case "decoupled":
                p.mul_(1 - group["lr"] * group["weight_decay"])
            case "independent":
                p.mul_(1 - group["weight_decay"])
            case "l2":
                g.add_(p, alpha=group["weight_decay"])  # in place, as there
        momentum.lerp_(g, 1 - group["momentum"])
        p.sub_(self.update(g.lerp(momentum, group["momentum"]) if self.nesterov else momentum, g, state, group), alpha=group["lr"])

    def update(self, matrix: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """From the NS input to the update."""
        update: Tensor = self.scaled_orthogonalize_fn(matrix)
        return update


@reported_as("emerging_optimizers.orthogonalized_optimizers.adaptive_muon", "AdaptiveMuon")
class AdaptiveMuon(NvidiaMuon):
    """NVIDIA Emerging-Optimizers: AdaptiveMuon. As its Muon, but O is divided by the root of `moment2_buffer`, without bias correction, before
    it is scaled: of every coordinate ("adamuon"), of rows or columns ("normuon"); "namo" multiplies it by ‖M‖/√v, v of ‖g‖²."""

    def __init__(self, params: Iterable[Any], *, moment2_method: str = "adamuon", extra_scale_factor: float = 0.2, **settings: Any) -> None:
        super().__init__(params, extra_scale_factor=extra_scale_factor, **settings)
        self.moment2_method = moment2_method

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The library's class has one of its own, too. Not `super()`'s, which torch gives step hooks of its own."""
        return StandIn.step(self, closure)

    def update(self, matrix: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        o = self.orthogonal(matrix)
        match self.moment2_method:
            case "adamuon":
                seen = o.square()
            case "normuon":
                seen = o.square().mean(-1 if o.shape[0] >= o.shape[1] else -2, keepdim=True)
            case _:
                seen = g.square().sum().reshape(1)
        v = state.setdefault("moment2_buffer", torch.zeros_like(seen)).lerp_(seen, 1 - 0.95)
        size = matrix.norm() if self.moment2_method == "namo" else 1.0
        return self.scaled(o * size / (v.sqrt() + 1e-8))


@reported_as("optimizers.mars_m", "MARS_M")
class MarsM(StandIn):
    """AGI-Arena/MARS, `MARS_M/optimizers/mars_m.py`, approximate mode: `momentum_buffer` averages c_t, which is clipped to norm 1, and is the NS
    input; `last_grad` is zero at first; decay is `wd`; Jordan's coefficients; ×0.2√max; AdamW with `moment1` and `moment2` in the same group
    for the parameters whose state says `use_muon` False."""

    def __init__(
        self, muon_params: Iterable[Any], adamw_params: Iterable[Any] = (), lr: float = 0.01, wd: float = 0.1, gamma: float = 0.025
    ) -> None:
        by_muon, by_adamw = list(muon_params), list(adamw_params)
        settings = {"lr": lr, "wd": wd, "momentum": 0.95, "ns_steps": 5, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8, "gamma": gamma}
        super().__init__(by_muon + by_adamw, {**settings, "mars_factor": gamma * 0.95 / (1 - 0.95)})
        for p in by_muon + by_adamw:
            self.state[p]["use_muon"] = any(p is one for one in by_muon)

    def one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta, lr, (beta1, beta2) = group["momentum"], group["lr"], group["adamw_betas"]
        p.mul_(1 - lr * group["wd"])
        if state["use_muon"]:
            momentum, last = (state.setdefault(key, torch.zeros_like(g)) for key in ("momentum_buffer", "last_grad"))
            c = g + group["mars_factor"] * (g - last)
            momentum.lerp_(c / max(1.0, float(c.norm())), 1 - beta)
            p.sub_(zeropower_via_newtonschulz5(momentum, group["ns_steps"]), alpha=lr * 0.2 * sqrt(max(p.shape)))
            state["last_grad"] = g
        else:
            m, v = (state.setdefault(key, torch.zeros_like(g)) for key in ("moment1", "moment2"))
            state["step"] = t = state.get("step", 0) + 1
            m.lerp_(g, 1 - beta1), v.lerp_(g.square(), 1 - beta2)
            p.sub_(m / (v.sqrt() + group["adamw_eps"]), alpha=lr * sqrt(1 - beta2**t) / (1 - beta1**t))
