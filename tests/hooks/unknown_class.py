"""Optimizers of a class that Optiscope has never seen, with odd names in their state, and what shows how they are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optiscope.hooks import attach
from optiscope.hooks.adapters import Adapter, Reading
from optiscope.hooks.adapters.identification import STEPS
from optiscope.hooks.observing.watched import watch

Make = Callable[..., nn.Sequential]
Read = Callable[[str | Path], Any]
Keep = Callable[[dict[str, Any], Tensor, Tensor], None]  # changes a state, given gradient and weights before the step

EXACT = 1e-12  # a float64 mean over the same float32 numbers


class Odd(Optimizer):
    """Descends along the signs of the gradient, and keeps in its state whatever `keeps` puts there."""

    def __init__(self, params: Any, *keeps: Keep, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.keeps = keeps

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.keeps:
                    for keep in self.keeps:
                        keep(self.state[p], p.grad, p)
                p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss


def average(
    key: str, of: Callable[[Tensor], Tensor] = lambda g: g, beta: float = 0.9, keep: Callable[[Tensor], Tensor] = torch.clone
) -> Keep:
    """Keeps an average of something of the gradients under `key`, stored by way of `keep`."""

    def kept(state: dict[str, Any], gradient: Tensor, weight: Tensor) -> None:
        own = state.setdefault("hidden from tensors", Hidden()).averages
        own[key] = beta * own.get(key, 0.0) + (1 - beta) * of(gradient)
        state[key] = keep(own[key])

    return kept


class Hidden:
    """Carries an average from step to step where no tensor of the state shows it."""

    def __init__(self) -> None:
        self.averages: dict[str, Any] = {}


def put(key: str, value: Callable[[Tensor, Tensor], Any]) -> Keep:
    """Puts something of gradient and weights under `key`, anew at every step."""

    def kept(state: dict[str, Any], gradient: Tensor, weight: Tensor) -> None:
        state[key] = value(gradient, weight)

    return kept


def previous(state: dict[str, Any], gradient: Tensor, weight: Tensor) -> None:
    state["g_old"] = state.get("g_new", torch.zeros_like(gradient))
    state["g_new"] = gradient.clone()


def slow(state: dict[str, Any], gradient: Tensor, weight: Tensor) -> None:
    state["w1"] = state.get("w1", weight.detach().clone()).lerp(weight, 0.1)


def iterate(state: dict[str, Any], gradient: Tensor, weight: Tensor) -> None:
    state["w2"] = state.get("w2", weight.detach().clone()) - 1e-3 * gradient


def count(state: dict[str, Any], gradient: Tensor, weight: Tensor) -> None:
    state["t"] = state.get("t", torch.zeros(())) + 1


DECOYS: tuple[Keep, ...] = (
    previous,  # the last gradient, and the one before
    put("minus_g", lambda g, w: -g),
    put("zeros", lambda g, w: torch.zeros_like(g)),
    put("ones", lambda g, w: torch.ones_like(g)),
    slow,
    iterate,
    count,
    put("w0_low", lambda g, w: w.detach().bfloat16()),
    put("g_squared", lambda g, w: g.square()),
    put("counts", lambda g, w: torch.full(g.shape, 3)),
    put("list", lambda g, w: [None, "text", 2.0]),
)


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim >= 2]


def backward(model: nn.Module, step: int) -> Tensor:
    """A regression on data of its own at every step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(24, 8, generator=generator)
    loss: Tensor = (model(x) - x[:, :5].sin()).square().mean()
    loss.backward()
    return loss


def run(optimizer: Any, model: nn.Module, store: Path, kept: Callable[[nn.Parameter], Any], steps: int = STEPS + 3) -> list[list[Any]]:
    """Train recorded at every step; what `kept` gave of every matrix after every step."""
    seen: list[list[Any]] = []
    with attach(optimizer, model, store, every=1, on_error="raise"):
        for step in range(steps):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            seen.append([kept(p) for p in weights(model)])
    return seen


def identified(optimizer: Any, model: nn.Module) -> Adapter:
    """The adapter that the first steps of a training lead to."""
    (unknown,) = watch([optimizer])
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        unknown.identify(after_step=False)
        optimizer.step()
        assert unknown.identify(after_step=True) is (step == STEPS - 1)
    assert unknown.identification is None
    return unknown.found


def readings(optimizer: Any, model: nn.Module) -> list[Reading]:
    """What an adapter is given for every matrix after a step."""
    return [Reading(optimizer, p, p.detach(), optimizer.param_groups[0], optimizer.state[p], p.grad) for p in weights(model)]


def rms(tensor: Tensor) -> float:
    return float(np.sqrt(np.mean(np.square(tensor.double().numpy()))))


def norms_of(run: Any) -> Any:
    return run["geometry"]["fro_norm"].values


def entry(run: Any) -> Any:
    return run.attrs["optimizers"][0]
