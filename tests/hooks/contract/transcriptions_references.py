"""The Muon-type reference optimizers written out in float64; their Newton–Schulz is done on singular values, not on matrices."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from contract.harness import Expected, Floats, Transcription

JORDAN = (3.4445, -4.7750, 2.0315)


def through_svd(matrix: Any, triples: Sequence[Sequence[float]], start: Any = None) -> Floats:
    """Newton–Schulz by its definition on singular values: U·p_T(…p_1(σ/‖M‖_F))·Vᵀ; of σ itself where a `start` is given."""
    u, sigma, vt = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    x = sigma / np.sqrt((sigma**2).sum()) if start is None else sigma
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    return np.asarray(u @ np.diag(x) @ vt)


def adamuon(shape: tuple[int, ...], *, sign: bool, beta: float = 0.95, beta2: float = 0.999, eps: float = 1e-8) -> Transcription:
    """AdaMuon, Algorithm 1 of the first version, or with signs that of the later ones, line by line."""
    m, v, t = np.zeros(shape), np.zeros(shape), 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        t += 1
        m = beta * m + (1 - beta) * g
        if sign:
            o = through_svd(np.sign((1 - beta) * g + beta * m), [JORDAN] * 5)
            v = beta * v + (1 - beta) * o**2
            o_hat = o / (np.sqrt(v) + eps)
            update = 0.2 * np.sqrt(shape[0] * shape[1]) / (np.linalg.norm(o_hat) + eps) * o_hat
        else:
            o = through_svd(m, [JORDAN] * 5)
            v = beta2 * v + (1 - beta2) * o**2
            o_hat = o / (np.sqrt(v / (1 - beta2**t)) + eps)
            update = 0.2 / (np.sqrt(np.mean(o_hat**2)) + eps) * o_hat
        return Expected(m, v, update)

    return step


def heavy_ball(momentum: float) -> Transcription:
    """b ← μb + g."""
    b: Any = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal b
        b = momentum * b + g
        return Expected(b)

    return step


def mars_m(beta: float = 0.95, gamma: float = 0.025) -> Transcription:
    """c = g + γβ/(1 − β)·(g − g_last), cut to norm 1 (the first g_last is 0, as in the authors' code); b ← βb + (1 − β)c."""
    b: Any = 0.0
    last: Any = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal b, last
        c = g + gamma * beta / (1 - beta) * (g - last)
        b, last = beta * b + (1 - beta) * c / max(1.0, float(np.linalg.norm(c))), g
        return Expected(b)

    return step
