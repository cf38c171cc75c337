"""Muons of several libraries for the tests of schedules: one table, one model, and the iteration written out in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytorch_optimizer as po
import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from optiscope.diagnostics import FAMILIES, JORDAN, Coefficients, OperatorSchedule, Schedule

QUINTIC = FAMILIES["quintic"].coefficients[0]
POLAR_EXPRESS = FAMILIES["polar_express"].coefficients

OPERATORS = {"q_proj": "attn_q", "v_proj": "attn_v", "up_proj": "mlp_up", "mixer": "other"}


def schedule_of(**operators: Coefficients) -> Schedule:
    return Schedule({name: OperatorSchedule(coefficients, (), 0.0, 0.0, 0) for name, coefficients in operators.items()})


# Fewer, more and as many steps as the five that are in force, and `other` left as it is.
UNEQUAL = schedule_of(attn_q=POLAR_EXPRESS[:3], attn_v=POLAR_EXPRESS[:6], mlp_up=((3.0, -3.2, 1.2), *[QUINTIC] * 3))
EQUAL = schedule_of(**dict.fromkeys(OPERATORS.values(), (JORDAN,) * 5))


class TwoLayers(nn.Module):
    """Two matrices each of four operators, tall, wide and square, `attn_q` and `other` of the same shape, and two vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "q_proj": nn.Linear(16, 16, bias=False), "v_proj": nn.Linear(16, 8, bias=False),
                "up_proj": nn.Linear(16, 40, bias=False), "mixer": nn.Linear(16, 16, bias=False),
                "norm": nn.LayerNorm(16, bias=False),
            }) for _ in range(2)
        )  # fmt: skip

    def of_muon(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.ndim == 2}

    def of_adamw(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.ndim == 1]

    def give_gradients(self, seed: int) -> None:
        """Singular values from 1 to 1/20, evenly in log: what bfloat16 does to much smaller ones is its noise."""
        rng = np.random.default_rng(seed)
        for p in self.parameters():
            if p.ndim == 1:
                p.grad = torch.from_numpy(rng.standard_normal(p.shape)).float()
                continue
            u, _, vt = np.linalg.svd(rng.standard_normal(p.shape), full_matrices=False)
            p.grad = torch.from_numpy((u * np.geomspace(1, 1 / 20, min(p.shape))) @ vt).float()

    def as_bytes(self) -> list[bytes]:
        return [p.detach().numpy().tobytes() for p in self.parameters()]


def train(model: TwoLayers, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        model.give_gradients(step)
        optimizer.step()


def operator_of(name: str) -> str:
    return OPERATORS[name.split(".")[2]]


def coefficients_in_force(name: str, schedule: Schedule) -> Coefficients:
    entry = schedule.operators.get(operator_of(name))
    return (JORDAN,) * 5 if entry is None else entry.coefficients


def newton_schulz(m: Tensor, coefficients: Coefficients, dtype: torch.dtype = torch.float64) -> Tensor:
    """As in the papers: X₀ = M/‖M‖_F, X ← aX + (bA + cA²)X with A = XXᵀ."""
    x = m.to(dtype)
    x = x / x.norm()
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class TimmMuon(Optimizer):
    """What a schedule needs to know of timm's Muon: its fields, coefficients as a name, a triple or a list, and its safety factor."""

    def __init__(self, params: Any, ns_coefficients: Any = "original", safety_factor: float = 1.0) -> None:
        defaults = {"lr": 0.02, "momentum": 0.95, "ns_steps": 5, "ns_coefficients": ns_coefficients, "safety_factor": safety_factor}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            given = group["ns_coefficients"]
            triples = {"original": [JORDAN]}[given] if isinstance(given, str) else given
            triples = [triples] if isinstance(triples[0], float) else triples
            coefficients = [triples[min(i, len(triples) - 1)] for i in range(group["ns_steps"])]
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("use_muon", not group.get("use_fallback", False) and p.ndim > 1)
                if not state["use_muon"]:
                    p.sub_(p.grad, alpha=group["lr"])
                    continue
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                # Starting from M/(s‖M‖_F) with a, b, c is starting from M/‖M‖_F with a/s, b/s³, c/s⁵.
                s = group["safety_factor"]
                a, b, c = coefficients[0]
                p.sub_(newton_schulz(buffer, [(a / s, b / s**3, c / s**5), *coefficients[1:]], torch.float32), alpha=group["lr"])


TimmMuon.__module__, TimmMuon.__qualname__ = "timm.optim.muon", "Muon"


class StepsOnlyMuon(Optimizer):
    """The fields of Moonlight's Muon and MARS-M: a number of steps per group, AdamW's parameters in the same group."""

    def __init__(self, matrices: Any, vectors: Any) -> None:
        matrices, vectors = list(matrices), list(vectors)
        super().__init__([*matrices, *vectors], {"lr": 0.02, "momentum": 0.95, "ns_steps": 5})
        for p in (*matrices, *vectors):
            self.state[p]["use_muon"] = p.ndim == 2

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if state["use_muon"]:
                    buffer = state.setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                    p.sub_(newton_schulz(buffer, (JORDAN,) * group["ns_steps"], torch.bfloat16), alpha=group["lr"])
                else:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


def of_pytorch_optimizer(kind: Any, **options: Any) -> Callable[[TwoLayers], Optimizer]:
    def make(model: TwoLayers) -> Optimizer:
        groups = [{"params": list(model.of_muon().values()), "use_muon": True}, {"params": model.of_adamw(), "use_muon": False}]
        return kind(groups, **options)

    return make


MUONS: dict[str, Callable[[TwoLayers], Any]] = {
    "torch.optim.Muon": lambda model: Muon(model.of_muon().values(), lr=0.02, weight_decay=0.0),
    "timm": lambda model: TimmMuon(model.parameters()),
    "steps only": lambda model: StepsOnlyMuon(model.of_muon().values(), model.of_adamw()),
    "po.Muon gram": of_pytorch_optimizer(po.Muon, ns_method="gram_newton_schulz", ns_reset_steps=(2, 4)),
    **{
        f"po.{kind.__name__} foreach={foreach}": of_pytorch_optimizer(kind, foreach=foreach)
        for kind in (po.Muon, po.AdaMuon, po.NorMuon, po.AdaGO, po.MuonClip)
        for foreach in (True, False)
    },
}


def make(name: str) -> tuple[TwoLayers, Any]:
    model = TwoLayers()
    return model, MUONS[name](model)


def groups_of_muon(optimizer: Any) -> Iterator[dict[str, Any]]:
    return (group for group in optimizer.param_groups if "ns_steps" in group)
