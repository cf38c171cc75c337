"""Adaptive optimizers written out in float64 NumPy, one parameter at a time, from their papers' formulas.

As in :mod:`contract.transcriptions`: called once per step with the gradient the optimizer was handed and the weights before
the step. Moments start at 0 and are averaged as x ← βx + (1 − β)·new unless said otherwise; λ is decoupled decay.
"""

from collections.abc import Callable
from math import nan, sqrt

import numpy as np

from contract.harness import Expected, Floats, Transcription


def rms(x: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def norm(x: Floats) -> float:
    return float(np.linalg.norm(x))


def adagrad(eps: float = 1e-10, coupled: float = 0.0) -> Transcription:
    """Duchi, Hazan & Singer 2011: s ← s + g², U = g/(√s + ε)."""
    s: Floats | float = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal s
        g = g + coupled * w
        s = s + g * g
        return Expected(None, s, g / (np.sqrt(s) + eps), (nan, 1.0, eps))

    return step


def rmsprop(alpha: float = 0.99, eps: float = 1e-8, momentum: float = 0.0, centered: bool = False, coupled: float = 0.0) -> Transcription:
    """Hinton's lecture 6e: U = g/(√v + ε); centred (Graves 2013, Eq. 40) over √(v − m²); momentum sums these, b ← μb + U."""
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    b: Floats | float = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, b
        g = g + coupled * w
        m, v = alpha * m + (1 - alpha) * g, alpha * v + (1 - alpha) * g * g
        u = g / (np.sqrt(v - m * m if centered else v) + eps)
        if not momentum:
            return Expected(m if centered else None, v, u, None if centered else (nan, 1.0, eps))
        b = momentum * b + u
        return Expected(b, v, b, None if centered else (nan, 1.0, eps))

    return step


def adadelta(rho: float = 0.9, eps: float = 1e-6) -> Transcription:
    """Zeiler 2012, Algorithm 1: U = g·√(d + ε)/√(v + ε), d the average of U²."""
    v: Floats | float = 0.0
    d: Floats | float = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal v, d
        v = rho * v + (1 - rho) * g * g
        u = g * np.sqrt(d + eps) / np.sqrt(v + eps)
        d = rho * d + (1 - rho) * u * u
        return Expected(None, v, u, (nan, 1.0, sqrt(eps)))

    return step


def adamax(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, coupled: float = 0.0) -> Transcription:
    """Kingma & Ba, Algorithm 2: u = max(β₂u, |g| + ε), U = m̂/u. Its square stands where others have a second moment."""
    m: Floats | float = 0.0
    u: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, u, t
        t += 1
        g = g + coupled * w
        m, u = beta1 * m + (1 - beta1) * g, np.maximum(beta2 * u, np.abs(g) + eps)
        return Expected(m, u * u, m / (1 - beta1**t) / u, (1 - beta1**t, 1.0, nan))

    return step


def nadam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, psi: float = 0.004) -> Transcription:
    """Dozat 2016: U = (μ_{t+1}m/(1 − Πμ up to t + 1) + (1 − μ_t)g/(1 − Πμ))/(√v̂ + ε), μ_t = β₁(1 − 0.96^{tψ}/2)."""
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    t, product = 0, 1.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t, product
        t += 1
        mu, following = (beta1 * (1 - 0.5 * 0.96 ** (s * psi)) for s in (t, t + 1))
        product *= mu
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        mixed = following * m / (1 - product * following) + (1 - mu) * g / (1 - product)
        return Expected(m, v, mixed / (np.sqrt(v / (1 - beta2**t)) + eps), (1 - beta1**t, 1 - beta2**t, eps))

    return step


def radam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Transcription:
    """Liu et al. 2020, Algorithm 2: U = m̂ while ρ_t ≤ 5, then r_t·m̂/√v̂."""
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    t, longest = 0, 2 / (1 - beta2) - 1

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        t += 1
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        update = m / (1 - beta1**t)
        if length > 5:
            r = sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
            update = update * r * sqrt(1 - beta2**t) / (np.sqrt(v) + eps)
        return Expected(m, v, update, (1 - beta1**t, 1 - beta2**t, eps / sqrt(1 - beta2**t)))

    return step


def gradient_only(g: Floats, w: Floats) -> Expected:
    """U = g (Polyak averaging beside it does not enter the step)."""
    return Expected(update=g)


def adafactor(
    beta2: Callable[[int], float],
    rate: Callable[[int, Floats], float] | None = None,
    beta1: float | None = None,
    clip: float = 1.0,
    eps: float = 1e-30,
    floor: float = 0.0,
) -> Transcription:
    """Shazeer & Stern 2018, Algorithms 4 and 5: V̂ = r cᵀ/mean(r) of g² + ε, U = g/√V̂ with its RMS clipped.

    torch adds no ε, and bounds V̂ from below by `floor`. With momentum, what is averaged is α_t·U (`rate` gives α_t), and the step is that average over α_t.
    """
    r: Floats | float = 0.0
    c: Floats | float = 0.0
    m: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal r, c, m, t
        t += 1
        b, square = beta2(t), g * g + eps
        r, c = b * r + (1 - b) * square.mean(1), b * c + (1 - b) * square.mean(0)
        v, averages = np.outer(r, c) / np.mean(r), (nan, 1.0, sqrt(floor) or nan)
        u = g / np.sqrt(np.maximum(v, floor))
        u = u / max(1.0, rms(u) / clip)
        if beta1 is None or rate is None:
            return Expected(None, v, u, averages)
        m = beta1 * m + (1 - beta1) * rate(t, w) * u
        return Expected(m, v, m / rate(t, w), averages)

    return step


def yogi(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-3, start: float = 1e-6) -> Transcription:
    """Zaheer et al. 2018, Algorithm 2: v ← v − (1 − β₂)·sign(v − g²)·g²; both moments start at `start`; U = m̂/(√v̂ + ε)."""
    m: Floats | float = start
    v: Floats | float = start
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        t += 1
        m, v = beta1 * m + (1 - beta1) * g, v - (1 - beta2) * np.sign(v - g * g) * g * g
        return Expected(m, v, m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps), (1 - beta1**t, 1 - beta2**t, eps))

    return step


def adabelief(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-16) -> Transcription:
    """Zhuang et al. 2020, Algorithm 2: s ← β₂s + (1 − β₂)(g − m)² + ε; U = m̂/(√ŝ + ε)."""
    m: Floats | float = 0.0
    s: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, s, t
        t += 1
        m = beta1 * m + (1 - beta1) * g
        s = beta2 * s + (1 - beta2) * (g - m) ** 2 + eps
        return Expected(m, s, m / (1 - beta1**t) / (np.sqrt(s / (1 - beta2**t)) + eps), (1 - beta1**t, 1 - beta2**t, eps))

    return step


def adabound(
    lr: float, final: float = 0.1, gamma: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Transcription:
    """Luo et al. 2019, Algorithm 2: the rate of every coordinate is held between two bounds that close in on `final`."""
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        t += 1
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        rates = lr * sqrt(1 - beta2**t) / (1 - beta1**t) / (np.sqrt(v) + eps)
        lower, upper = final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t))
        # The library's √(v + 1e-15) + ε at v = 0.
        averages = 1 - beta1**t, 1 - beta2**t, (sqrt(1e-15) + eps) / sqrt(1 - beta2**t)
        return Expected(m, v, np.clip(rates, lower, upper) * m / lr, averages)

    return step


def lion(beta1: float = 0.9, beta2: float = 0.99) -> Transcription:
    """Chen et al. 2023, Algorithm 2: U = sign(β₁m + (1 − β₁)g), then m ← β₂m + (1 − β₂)g."""
    m: Floats | float = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m
        u = np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
        return Expected(m, None, u)

    return step


def sophia(draw: Callable[[], Floats], beta1: float = 0.96, beta2: float = 0.99, bound: float = 1e-2, eps: float = 1e-12) -> Transcription:
    """Liu et al. 2023, Algorithm 3 with one estimate of the Hessian's diagonal, at the first step: U = clip(m/max(h, ε), bound)."""
    m: Floats | float = 0.0
    h: Floats | None = None

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, h
        m = beta1 * m + (1 - beta1) * g
        h = (1 - beta2) * draw() if h is None else h
        return Expected(m, h, np.clip(m / np.maximum(h, eps), -bound, bound), (1.0, 1.0, nan))

    return step


def mars(beta1: float = 0.95, beta2: float = 0.99, gamma: float = 0.025, eps: float = 1e-8, of: str = "adamw") -> Transcription:
    """Yuan et al. 2024, Algorithm 2: c = g + γβ₁/(1 − β₁)·(g − g_last), cut to norm 1, in AdamW's or Lion's or Muon's place of g."""
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    last: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, last, t
        t += 1
        c = g + gamma * beta1 / (1 - beta1) * (g - last)
        c = c / max(1.0, norm(c))
        m, v, last = beta1 * m + (1 - beta1) * c, beta2 * v + (1 - beta2) * c * c, g
        match of:
            case "adamw":
                # The library's √(v + 1e-15) + ε at v = 0.
                averages = 1 - beta1**t, 1 - beta2**t, (sqrt(1e-15) + eps) / sqrt(1 - beta2**t)
                return Expected(m, v, m / (1 - beta1**t) / ((np.sqrt(v) + eps) / sqrt(1 - beta2**t)), averages)
            case "lion":
                return Expected(m, None, np.sign(m))
            case _:
                return Expected(m)

    return step


def lookahead(inner: Transcription, lr: float, every: int, alpha: float = 0.5) -> Transcription:
    """Zhang et al. 2019, Algorithm 1: after every k steps W ← slow + α(W − slow), and slow is what comes out."""
    slow: Floats | None = None
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal slow, t
        t += 1
        slow = w if slow is None else slow
        kept = inner(g, w)
        assert kept.update is not None
        after = w - lr * kept.update
        if t % every == 0:
            slow = after = slow + alpha * (after - slow)
        return Expected(kept.momentum, kept.second, (w - after) / lr, kept.averages)

    return step
