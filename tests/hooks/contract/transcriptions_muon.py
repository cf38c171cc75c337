"""Muon and its relatives in float64 NumPy, as in :mod:`contract.transcriptions`.

The libraries iterate in bfloat16 or float16. Where only a scale follows the iteration, the contract compares the update with what
the iteration itself gave, and here is the momentum alone. What follows elsewhere starts from the iteration's own output, which is
handed in: a float64 iteration lifts what bfloat16 has rounded away to another direction, and the division by √v makes that large.
"""

from collections.abc import Callable, Sequence
from math import sqrt

import numpy as np

from contract.harness import Expected, Floats, Transcription

Triple = tuple[float, float, float]

JORDAN: Triple = (3.4445, -4.7750, 2.0315)


def orthogonalised(m: Floats, triples: Sequence[Triple] = (JORDAN,) * 5) -> Floats:
    """Jordan et al. 2024: X₀ = M/‖M‖_F, then X ← aX + (bA + cA²)X with A = XXᵀ for every triple."""
    x = m / np.linalg.norm(m)
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def original(rows: int, cols: int) -> float:
    """√max(1, m/n), Keller Jordan's scale of O."""
    return sqrt(max(1, rows / cols))


def muon(momentum: float = 0.95, averaged: bool = True, coupled: float = 0.0) -> Transcription:
    """M ← μM + (1 − μ)g, or summed M ← μM + g; `coupled` weight decay is added to the gradient."""
    m: Floats | float = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m
        m = momentum * m + (1 - momentum if averaged else 1) * (g + coupled * w)
        return Expected(m)

    return step


def adamuon(
    orthogonalise: Callable[[Floats], Floats], adjusted: bool = True, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-10
) -> Transcription:
    """AdaMuon's first version (arXiv 2507.11005v1, Algorithm 1): V averages O², U = 0.2·Ô/RMS(Ô) with Ô = O/(√V̂ + ε).

    Not `adjusted`, U has the norm of an exact polar factor under Keller Jordan's scale.
    """
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        t += 1
        m = beta1 * m + (1 - beta1) * g
        o = orthogonalise(m)
        v = beta2 * v + (1 - beta2) * o * o
        divided = o / (np.sqrt(v / (1 - beta2**t)) + eps)
        size = 0.2 * sqrt(g.size) if adjusted else original(*g.shape) * sqrt(min(g.shape))
        return Expected(m, v, size * divided / np.linalg.norm(divided))

    return step


def normuon(
    orthogonalise: Callable[[Floats], Floats], match_rms: bool, momentum: float = 0.95, beta2: float = 0.95, eps: float = 1e-10
) -> Transcription:
    """NorMuon (arXiv 2510.05491, Algorithm 1): v averages the rows' means of O²; O/(√v + ε) takes back O's norm, or the RMS 0.2."""
    m: Floats | float = 0.0
    v: Floats | float = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v
        m = momentum * m + (1 - momentum) * g
        o = orthogonalise((1 - momentum) * g + momentum * m)
        v = beta2 * v + (1 - beta2) * np.mean(o * o, axis=1, keepdims=True)
        divided = o / (np.sqrt(v) + eps)
        size = 0.2 * sqrt(o.size) if match_rms else original(*g.shape) * np.linalg.norm(o)
        return Expected(m, v, size * divided / np.linalg.norm(divided))

    return step


def adago(momentum: float = 0.95, gamma: float = 10.0, start: float = 1e-6) -> Transcription:
    """AdaGO (arXiv 2509.02981, Algorithm 1): v sums min(‖g‖, γ)². The library divides by it, the paper by its root."""
    m: Floats | float = 0.0
    v = start

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v
        m = momentum * m + (1 - momentum) * g
        v += min(float(np.linalg.norm(g)), gamma) ** 2
        return Expected(m, np.asarray(v))

    return step


def summed_by_backward(g: Floats, w: Floats) -> Expected:
    """SCIONLight: the gradient that comes in is the momentum."""
    return Expected(g)
