"""Optimizers written out in float64 NumPy, one parameter at a time, from their papers' formulas.

Each function takes the hyper-parameters and returns a `Transcription`: called once per step with the gradient the optimizer
was handed and the weights before the step, it gives moments and update. Weights are the training's own, so that rounding
does not add up.
"""

import numpy as np

from contract.harness import Expected, Floats, Transcription


def sgd(momentum: float = 0.0, nesterov: bool = False, decay: float = 0.0) -> Transcription:
    """torch.optim.SGD: b ← μb + (g + λw), the first b being the gradient; U = b, or g + μb under Nesterov."""
    kept: dict[str, Floats] = {}

    def step(g: Floats, w: Floats) -> Expected:
        g = g + decay * w
        if not momentum:
            return Expected(update=g)
        kept["b"] = momentum * kept["b"] + g if kept else g
        return Expected(kept["b"], update=g + momentum * kept["b"] if nesterov else kept["b"])

    return step


def adam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, coupled: float = 0.0, amsgrad: bool = False) -> Transcription:
    """Kingma & Ba, Algorithm 1; `coupled` weight decay is added to the gradient; AMSGrad divides by the running maximum of v."""
    m: Floats | float = 0.0
    v: Floats | float = 0.0
    largest: Floats | float = 0.0
    t = 0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, largest, t
        t += 1
        g = g + coupled * w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        largest = np.maximum(largest, v)
        second, averages = largest if amsgrad else v, (1 - beta1**t, 1 - beta2**t, eps)
        return Expected(m, second, (m / averages[0]) / (np.sqrt(second / averages[1]) + eps), averages)

    return step


def ema_muon(momentum: float) -> Transcription:
    """The momentum of torch.optim.Muon: b ← μb + (1 − μ)g."""
    b: Floats | float = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal b
        b = momentum * b + (1 - momentum) * g
        return Expected(b)

    return step
