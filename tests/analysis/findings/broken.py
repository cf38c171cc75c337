"""A Muon of our own that is right, and others that each have one mistake. Their adapter says what the right one does."""

from math import sqrt

import torch
from torch.optim import Optimizer

from optiscope.diagnostics.quantities.problem import NewtonSchulz
from optiscope.hooks.adapters import Adapter, Orthogonalisation, entry

JORDAN = (3.4445, -4.7750, 2.0315)
# Emerging-Optimizers' Polar Express since November 2025, and before.
POLAR_EXPRESS = (
    (8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853), (2.2779, -1.6198, 0.3985),
)  # fmt: skip
WRONG_POLAR_EXPRESS = (
    (7.2086, -15.5131, 9.0178), (3.9623, -2.5813, 0.4542), (3.9466, -2.5765, 0.4544), (3.8991, -2.5671, 0.4566), (3.7186, -2.5308, 0.4653),
)  # fmt: skip


class OwnMuon(Optimizer):
    """Moonlight's rule: M ← 0.95·M + 0.05·G, W ← W − η·0.2·√max(m, n)·NS(M)."""

    def __init__(self, params, lr=0.01, ns_coefficients=(JORDAN,) * 5, ns_steps=5, ns_eps=1e-7):
        super().__init__(params, {"lr": lr, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "ns_eps": ns_eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 0.05)
                p.sub_(group["lr"] * self.scaled(self.orthogonalise(momentum, group), state))

    def orthogonalise(self, matrix, group):
        x = matrix / matrix.norm().clamp(min=group["ns_eps"])
        return self.iterate(x, group["ns_coefficients"][: group["ns_steps"]])

    def iterate(self, x, coefficients):
        for a, b, c in coefficients:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    def scaled(self, o, state):
        return 0.2 * sqrt(max(o.shape)) * o


class FactorlessMuon(OwnMuon):
    """The factor 0.2 is missing."""

    def scaled(self, o, state):
        return sqrt(max(o.shape)) * o


class IdleMuon(OwnMuon):
    """The iteration does not run, whatever the settings say."""

    def iterate(self, x, coefficients):
        return x


class ReversedMuon(OwnMuon):
    """The update has the wrong sign."""

    def scaled(self, o, state):
        return -super().scaled(o, state)


class OverwritingMuon(OwnMuon):
    """Normalises the momentum itself, not a copy."""

    def orthogonalise(self, matrix, group):
        return self.iterate(matrix.div_(matrix.norm()), group["ns_coefficients"])


class OwnAdaMuon(OwnMuon):
    """V ← 0.95·V + 0.05·O², Ô = O/√V, W ← W − η·0.2·Ô/RMS(Ô)."""

    def scaled(self, o, state):
        o = self.divided(o, state)
        return 0.2 * o / o.square().mean().sqrt()

    def divided(self, o, state):
        v = state.setdefault("moment2_buffer", torch.zeros_like(o)).lerp_(o.square(), 0.05)
        return o / (v.sqrt() + 1e-8)


class UnalignedAdaMuon(OwnAdaMuon):
    """Ô is scaled as if it were O."""

    def scaled(self, o, state):
        return 0.2 * sqrt(max(o.shape)) * self.divided(o, state)


def settings(reading):
    group = reading.group
    return NewtonSchulz(tuple(group["ns_coefficients"][: group["ns_steps"]]), group["ns_eps"])


# What their author means them to do.
MUON = Adapter(
    "exact NS input: momentum_buffer after the step",
    momentum=entry("momentum_buffer"),
    orthogonalisation=Orthogonalisation(entry("momentum_buffer"), settings, lambda reading, rows, cols: 0.2 * sqrt(max(rows, cols))),
)
ADAMUON = Adapter(
    "exact NS input: momentum_buffer after the step",
    momentum=entry("momentum_buffer"),
    orthogonalisation=Orthogonalisation(
        entry("momentum_buffer"), settings, lambda reading, rows, cols: float("nan"), lambda reading, rows, cols: 0.2
    ),
)
