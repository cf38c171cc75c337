"""The reference optimizers of `examples/optimizers` that run no Newton–Schulz iteration, written out in float64 NumPy."""

from collections.abc import Callable
from math import nan
from typing import Any

import numpy as np

from contract.harness import Expected, Floats, Transcription


def aro(shape: tuple[int, ...], momentum: float = 0.9, base: str = "row") -> Transcription:
    """R ← QR(M f(RᵀM)ᵀ), U = R f(RᵀM), with f written out by rows; a tall matrix is seen from its other side."""
    m: Any = 0.0
    r: Floats = np.eye(min(shape))

    def f(x: Floats) -> Floats:
        if base == "sign":
            return np.sign(x)
        return np.array([row / np.sqrt(row @ row) if row.any() else row for row in x])

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, r
        m = momentum * m + (1 - momentum) * g
        short = m if shape[0] <= shape[1] else m.T
        r = np.linalg.qr(short @ f(r.T @ short).T)[0]
        update = r @ f(r.T @ short)
        return Expected(m, None, update if shape[0] <= shape[1] else update.T)

    return step


def power(a: Floats, exponent: float) -> Floats:
    """A^exponent of a symmetric positive matrix, through its SVD (not the eigendecomposition that the optimizer takes)."""
    u, s, vt = np.linalg.svd(a)
    result: Floats = u * s**exponent @ vt
    return result


def caspr(shape: tuple[int, ...], beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-8) -> Transcription:
    """The three terms, one by one. Second moment: row sums times column sums of the average of g², over its sum."""
    m: Any = 0.0
    left: Any = 0.0
    right: Any = 0.0
    second: Any = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, left, right, second, t
        t += 1
        m = beta1 * m + (1 - beta1) * g
        left, right = beta2 * left + (1 - beta2) * g @ g.T, beta2 * right + (1 - beta2) * g.T @ g
        second = beta2 * second + (1 - beta2) * g * g
        a = left / (1 - beta2**t) + eps * np.eye(shape[0])
        b = right / (1 - beta2**t) + eps * np.eye(shape[1])
        terms = power(a, -0.5) @ m + 2 * power(a, -0.25) @ m @ power(b, -0.25) + m @ power(b, -0.5)
        implied = np.outer(second.sum(1), second.sum(0)) / second.sum()
        return Expected(m, implied, terms / 4 / (1 - beta1**t))

    return step


def onebit_adam(shape: tuple[int, ...], freeze: int, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Transcription:
    """Kingma & Ba's Algorithm 1, then Tang et al.'s with one worker, entry by entry where it compresses."""
    m, v, e, t = np.zeros(shape), np.zeros(shape), np.zeros(shape), 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, e, t
        t += 1
        m = beta1 * m + (1 - beta1) * g
        if t <= freeze:
            v = beta2 * v + (1 - beta2) * g * g
        else:
            x = m + e
            scale = sum(abs(value) for value in x.flat) / x.size
            m = np.array([scale if value >= 0 else -scale for value in x.flat]).reshape(shape)
            e = x - m
        v_hat = v / (1 - beta2 ** min(t, freeze))
        return Expected(m, v, m / (1 - beta1**t) / (np.sqrt(v_hat) + eps), (1 - beta1**t, 1 - beta2 ** min(t, freeze), eps))

    return step


def sophia_g(
    estimate: Callable[[], Floats | None], tokens: int, gamma: float = 0.05, beta1: float = 0.965, beta2: float = 0.99, eps: float = 1e-12
) -> Transcription:
    """Liu et al.'s Algorithm 3; `estimate` gives the gradient for drawn labels that the step has, ĝ, or None."""
    m: Any = 0.0
    h: Any = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, h
        m = beta1 * m + (1 - beta1) * g
        if (drawn := estimate()) is not None:
            h = beta2 * h + (1 - beta2) * tokens * drawn**2
        return Expected(m, h, np.clip(m / np.maximum(gamma * h, eps), -1, 1), (1.0, 1.0, nan))

    return step
