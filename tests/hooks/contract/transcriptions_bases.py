"""Optimizers that work in a basis of their own, written out in float64 NumPy as in :mod:`contract.transcriptions`.

Where a basis is drawn at random, or is one of many that do as well (eigenvectors of equal eigenvalues), it is taken from the
optimizer, and the tests of acceptance say separately what it must be.
"""

from collections.abc import Callable
from math import sqrt

import numpy as np

from contract.harness import Expected, Floats, Transcription


def inverse_root(matrix: Floats, root: int) -> Floats:
    """A^{−1/root} of a symmetric matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values ** (-1 / root)) @ vectors.T


def implied(left: Floats, right: Floats) -> Floats:
    """diag(L)·diag(R)ᵀ/tr(R)."""
    return np.outer(np.diag(left), np.diag(right)) / np.trace(right)


def shampoo(eps: float = 1e-6, coupled: float = 0.0) -> Transcription:
    """Gupta, Koren & Singer 2018, Algorithm 1: L ← L + GGᵀ, R ← R + GᵀG, both from ε𝟙; U = L^{−1/4}GR^{−1/4}."""
    factors: list[Floats] = []

    def step(g: Floats, w: Floats) -> Expected:
        g = g + coupled * w
        if not factors:
            factors.extend(eps * np.eye(n) for n in g.shape)
        factors[0] = factors[0] + g @ g.T
        factors[1] = factors[1] + g.T @ g
        return Expected(None, implied(*factors), inverse_root(factors[0], 4) @ g @ inverse_root(factors[1], 4))

    return step


def scalable_shampoo(block: int, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-6, coupled: float = 0.0) -> Transcription:
    """Anil et al. 2020: factors averaged within blocks, from ε𝟙; the preconditioned gradient P takes the gradient's norm (SGD grafting).

    b ← β₁b + (P + λw), U = β₁b + P + λw (Nesterov). The library sees a matrix of more than `block` rows as 1 × m × n, so that
    every block has three factors, the first of them a number, and takes their sixth roots.
    """
    factors: dict[tuple[int, int], tuple[float, Floats, Floats]] = {}
    b: Floats | float = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal b
        p, v = np.zeros_like(g), np.zeros_like(g)
        for i in range(0, g.shape[0], block):
            for j in range(0, g.shape[1], block):
                where = slice(i, i + block), slice(j, j + block)
                part = g[where]
                whole, left, right = factors.get((i, j), (eps, eps * np.eye(part.shape[0]), eps * np.eye(part.shape[1])))
                whole = beta2 * whole + (1 - beta2) * float(np.sum(part * part))
                left, right = beta2 * left + (1 - beta2) * part @ part.T, beta2 * right + (1 - beta2) * part.T @ part
                factors[i, j] = whole, left, right
                v[where] = whole * implied(left, right) / np.trace(left)
                p[where] = whole ** (-1 / 6) * inverse_root(left, 6) @ part @ inverse_root(right, 6)
        p = p * np.linalg.norm(g) / np.linalg.norm(p) + coupled * w
        b = beta1 * b + p
        return Expected(b, v, beta1 * b + p)

    return step


def soap(bases: Callable[[], list[Floats]], lr: float, beta: float = 0.95, eps: float = 1e-8, decay: float = 0.0) -> Transcription:
    """Vyas et al. 2024, Algorithm 3, in a basis that stays as the first gradient made it: m averages G, v (Q_LᵀGQ_R)².

    The first step only makes the basis; U = Q_L(m̂'/(√v̂ + ε))Q_Rᵀ with m' = Q_Lᵀ m Q_R. Decay comes after the step.
    """
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    t = -1

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        t += 1
        if not t:
            return Expected()
        left, right = bases()
        m, v = beta * m + (1 - beta) * g, beta * v + (1 - beta) * (left.T @ g @ right) ** 2
        u = sqrt(1 - beta**t) / (1 - beta**t) * left @ (left.T @ m @ right / (np.sqrt(v) + eps)) @ right.T
        return Expected(m, v, u * (1 - lr * decay), (1 - beta**t, 1 - beta**t, eps / sqrt(1 - beta**t)))

    return step


Projection = tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]  # down, and back up


def along_singular_vectors(g: Floats, rank: int) -> Projection:
    """Onto the leading singular vectors of a gradient, of its shorter side, and back."""
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    if g.shape[0] >= g.shape[1]:
        return (lambda x: x @ vt[:rank].T), (lambda x: x @ vt[:rank])
    return (lambda x: u[:, :rank].T @ x), (lambda x: u[:, :rank] @ x)


def galore(rank: int | None, lr: float, scale: float = 1.0, decay: float = 0.0, eps: float = 1e-6) -> Transcription:
    """Zhao et al. 2024, Algorithm 2: Adam of the gradient's projection on the first gradient's leading singular vectors.

    What is compared is the moment lifted back. Decay comes after the step. v is kept in the projection, up to the signs of
    singular vectors, which its squares do not have.
    """
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    projection: Projection | None = None
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, projection, t
        t += 1
        if projection is None:
            projection = along_singular_vectors(g, rank) if rank is not None else (lambda x: x, lambda x: x)
        down, up = projection
        m, v = 0.9 * m + 0.1 * down(g), 0.999 * v + 0.001 * down(g) ** 2
        u = scale * up(m / (np.sqrt(v) + eps)) * sqrt(1 - 0.999**t) / (1 - 0.9**t)
        return Expected(up(m), v, u * (1 - lr * decay), (1 - 0.9**t, 1 - 0.999**t, eps / sqrt(1 - 0.999**t)))

    return step


def apollo(matrix: Callable[[], Floats], lr: float, scale: float = 1.0, decay: float = 0.0, eps: float = 1e-6) -> Transcription:
    """Zhu et al. 2024, Algorithm 1 by tensor: the projected gradient, scaled by ‖Adam's update of it‖/‖it‖, is lifted and applied.

    The random matrix is the optimizer's. The norm of what is applied grows by 1 % a step at most. Decay comes after the step,
    with the bias-corrected rate.
    """
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    last: float | None = None
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, last, t
        t += 1
        p, tall = matrix(), g.shape[0] >= g.shape[1]
        low = g @ p.T if tall else p.T @ g
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low * low
        u = np.linalg.norm(m / (np.sqrt(v) + eps)) / (np.linalg.norm(low) + 1e-8) * low
        if last is not None:
            u = u / (max(np.linalg.norm(u) / (last + 1e-8), 1.01) / 1.01)
        last = float(np.linalg.norm(u))

        def lift(x: Floats) -> Floats:
            return x @ p if tall else p @ x

        corrected = sqrt(1 - 0.999**t) / (1 - 0.9**t)
        u = scale**1.5 * corrected * lift(u)
        return Expected(lift(m), v, u * (1 - lr * corrected * decay), (1 - 0.9**t, 1 - 0.999**t, eps / sqrt(1 - 0.999**t)))

    return step
