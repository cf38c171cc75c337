"""Optimizers that come in a package of their own, and heavyball's SOAP, in float64 NumPy as in :mod:`contract.transcriptions`."""

from collections.abc import Callable
from dataclasses import replace
from math import nan

import numpy as np

from contract.harness import Expected, Floats, Transcription


def moments_of(whole: Transcription) -> Transcription:
    """The same without the update."""
    return lambda g, w: replace(whole(g, w), update=None)


def as_column(whole: Transcription) -> Transcription:
    """The same with a second moment of one number per block as a column, as adam-mini keeps it."""

    def step(g: Floats, w: Floats) -> Expected:
        kept = whole(g, w)
        assert kept.second is not None
        return replace(kept, second=kept.second[:, None]) if kept.second.ndim == 1 else kept

    return step


def prodigy(d: Callable[[int], float], beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Transcription:
    """Mishchenko & Defazio 2023, Algorithm 4: Adam of d_t·g, U = m/(√v + d_{t+1}ε) at the rate d_t·lr, without bias correction.

    d spans all parameters and is taken from the optimizer: `d(t)` is the one after t steps.
    """
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        m, v = beta1 * m + d(t) * (1 - beta1) * g, beta2 * v + d(t) ** 2 * (1 - beta2) * g * g
        t += 1
        return Expected(m, v, m / (np.sqrt(v) + d(t) * eps), (1.0, 1.0, d(t) * eps))

    return step


def schedule_free(
    lr: float, warmup: int = 0, decay: float = 0.0, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, more: float = 0.0
) -> Transcription:
    """Defazio et al. 2024, Algorithm 1, in its y-form: z ← z − η(ĝ + λy), and x, the average of all z with weights η_max².

    y = (1 − β₁)z + β₁x, ĝ = g/(√v̂ + ε). Of what y loses, the part −η(1 − β₁(1 − c))λy is decay, and no part of U.
    """
    v: Floats | float = 0.0
    z: Floats | None = None
    x: Floats | None = None
    t, highest, total = 0, 0.0, 0.0

    def step(g: Floats, y: Floats) -> Expected:
        nonlocal v, z, x, t, highest, total
        t += 1
        z = y if z is None else z
        x = y if x is None else x
        rate = lr * min(1.0, t / warmup) if warmup else lr
        highest = max(highest, rate)
        total += highest**2
        c = highest**2 / total
        v = beta2 * v + (1 - beta2) * g * g
        z = z - rate * (g / (np.sqrt(v / (1 - beta2**t)) + eps) + decay * y)
        x = (1 - c) * x + c * z
        share = decay * (1 - beta1 * (1 - c))
        # `more`: the denominator at v = 0, where a library has more than ε.
        return Expected(None, v, (y * (1 - rate * share) - ((1 - beta1) * z + beta1 * x)) / rate, (nan, 1 - beta2**t, eps + more))

    return step


def sophia_g(rho: float, batch: int, beta1: float = 0.965, beta2: float = 0.99) -> Transcription:
    """Liu et al. 2023, Algorithm 3: U = clip(m/(ρBh), 1), h averaging the squares of gradients that are given between the steps.

    Here those are the ones that the steps were given: h is one step behind.
    """
    m: Floats | float = 0.0
    h: Floats | None = None
    last: Floats | None = None

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, h, last
        h = np.zeros_like(g) if h is None or last is None else beta2 * h + (1 - beta2) * last * last
        m, last = beta1 * m + (1 - beta1) * g, g
        return Expected(m, h, np.sign(m) * np.minimum(np.abs(m) / (rho * batch * h + 1e-15), 1), (1.0, 1.0, nan))

    return step


def debiased_soap(bases: Callable[[int], list[Floats]], beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8) -> Transcription:
    """Vyas et al. 2024, Algorithm 3 as heavyball has it: both averages are kept bias-corrected, and m turns with the basis.

    The first step only makes a basis. Bases are the optimizer's: `bases(t)` those after t steps. v stays as it is when they turn.
    """
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        t += 1
        if t == 1:
            return Expected()
        left, right = bases(t - 1)
        one, two = (1 - (1 - beta) / (1 - beta ** (t - 1)) for beta in (beta1, beta2))
        m, v = one * m + (1 - one) * g, two * v + (1 - two) * (left.T @ g @ right) ** 2
        return Expected(m, v, left @ (left.T @ m @ right / np.maximum(np.sqrt(v), eps)) @ right.T, (1.0, 1.0, eps))

    return step
