"""Optimizers that look at a matrix, or a block of it, as a whole, written out as in :mod:`contract.transcriptions_elementwise`."""

from math import nan, sqrt

import numpy as np

from contract.harness import Expected, Floats, Transcription
from contract.transcriptions_elementwise import norm


def lars(trust: float = 1e-3, momentum: float = 0.9, nesterov: bool = False, decay: float = 0.0) -> Transcription:
    """You, Gitman & Ginsburg 2017, Algorithm 1: b ← μb + trust·‖w‖/(‖g‖ + λ‖w‖)·(g + λw)."""
    b: Floats | float = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal b
        scaled = trust * norm(w) / (norm(g) + decay * norm(w)) * (g + decay * w)
        b = momentum * b + scaled
        return Expected(b if momentum else None, None, scaled + momentum * b if nesterov else b)

    return step


def lamb(lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-6, coupled: float = 0.0, decay: float = 0.0) -> Transcription:
    """You et al. 2020, Algorithm 2 in its third version, without bias correction: U = φ(‖w‖)/‖u‖·u, u = m/(√v + ε) + λw, φ capped at 10.

    pytorch_optimizer divides by 1 − β₁ᵗ after the ratio, adds ε to ‖u‖, and takes ‖w‖ after decoupled decay.
    """
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        t += 1
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        u = m / (np.sqrt(v) + eps) + coupled * w
        ratio = min(norm(w * (1 - lr * decay)), 10.0) / (norm(u) + eps)
        return Expected(m, v, ratio * u / (1 - beta1**t), (1 - beta1**t, 1.0, eps))

    return step


def novograd(beta1: float = 0.95, beta2: float = 0.98, eps: float = 1e-8, coupled: float = 0.0) -> Transcription:
    """Ginsburg et al. 2019, Algorithm 1: v averages ‖g‖², from its first value on; m ← β₁m + (g/(√v + ε) + λw), U = m."""
    m: Floats | float = 0.0
    v: float | None = None

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v
        v = norm(g) ** 2 if v is None else beta2 * v + (1 - beta2) * norm(g) ** 2
        m = beta1 * m + g / (sqrt(v) + eps) + coupled * w
        return Expected(m, np.asarray(v), m, (nan, 1.0, eps))

    return step


def adam_mini(blocks: int | None, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Transcription:
    """Zhang et al. 2024, Algorithm 1: one v per block, the average of mean(g²) over it; blocks are runs of rows.

    `blocks` of them, each coordinate its own for None, and v a plain number for 0: the whole matrix.
    """
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        t += 1
        split = g.reshape(max(blocks, 1), -1) if blocks is not None else g
        square = (split * split).mean(1) if blocks is not None else g * g
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * square
        of_all = np.repeat(v, split.shape[1]).reshape(g.shape) if blocks is not None else v
        kept = np.asarray(v)[0] if blocks == 0 else v
        averages = 1 - beta1**t, 1 - beta2**t, eps
        return Expected(m, np.asarray(kept), m / averages[0] / (np.sqrt(of_all / averages[1]) + eps), averages)

    return step
