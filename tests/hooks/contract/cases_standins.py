"""Cases for libraries that cannot be installed here, on stand-ins with the libraries' state, and what the libraries keep in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from contract.harness import Case, Expected, Floats, Transcription, hidden, is_hidden, others
from contract.standins import SOAP, DistributedShampoo, KFACPreconditioner
from contract.standins_muon import AdaptiveMuon, Dion, DionMuon, DionNorMuon, MarsM, NvidiaMuon
from contract.transcriptions import sgd


def average(beta: float) -> Transcription:
    """m ← βm + (1 − β)g."""
    m: Any = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m
        m = beta * m + (1 - beta) * g
        return Expected(m)

    return step


def shampoo(name: str, shape: tuple[int, ...]) -> Transcription:
    """Blocks of 16 by 16 of a matrix: row sums times column sums of the average of g², over its sum, in each of them."""
    v: Any = 0.0
    momentum = average(0.9)

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal v
        v = 0.99 * v + 0.01 * g * g
        implied = np.zeros(shape)
        for i in range(0, shape[0], 16):
            for j in range(0, shape[1], 16):
                block = v[i : i + 16, j : j + 16]
                implied[i : i + 16, j : j + 16] = np.outer(block.sum(1), block.sum(0)) / max(block.sum(), 1e-300)
        return Expected(momentum(g, w).momentum, implied)

    return step


def heavy_ball(name: str, shape: tuple[int, ...]) -> Transcription:
    """dion's M ← 0.95·M + g."""
    m: Any = 0.0

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m
        m = 0.95 * m + g
        return Expected(m)

    return step


def mars_m(name: str, shape: tuple[int, ...]) -> Transcription:
    """c = g + 0.475·(g − g_last), g_last zero at first, cut to norm 1; M ← 0.95·M + 0.05·c. Elsewhere AdamW with β 0.9 and 0.95."""
    m: Any = 0.0
    v: Any = 0.0
    last: Any = 0.0
    t = 0

    def by_muon(g: Floats, w: Floats) -> Expected:
        nonlocal m, last
        c = g + 0.475 * (g - last)
        m, last = 0.95 * m + 0.05 * c / max(1.0, float(np.sqrt((c * c).sum()))), g
        return Expected(m)

    def by_adamw(g: Floats, w: Floats) -> Expected:
        nonlocal m, v, t
        t += 1
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        return Expected(m, v, m / (np.sqrt(v) + 1e-8) * np.sqrt(1 - 0.95**t) / (1 - 0.9**t))

    return by_muon if is_hidden(name) else by_adamw


def soap(name: str, shape: tuple[int, ...]) -> Transcription:
    """In the original basis exp_avg is the plain average of the gradients but the first, whatever the basis and its changes."""
    m: Any = None

    def step(g: Floats, w: Floats) -> Expected:
        nonlocal m
        m = np.zeros(shape) if m is None else 0.95 * m + 0.05 * g
        return Expected(m)

    return step


def with_adamw(build: Callable[[list[nn.Parameter]], Any]) -> Callable[[nn.Module], Any]:
    return lambda model: [build(hidden(model)), AdamW(others(model), lr=1e-3)]


def _with_kfac(model: nn.Module) -> SGD:
    model.kfac = KFACPreconditioner(model)  # type: ignore[assignment]
    return SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)


def _precondition_and_step(optimizer: Any, model: Any, loss: Callable[[], Tensor]) -> None:
    loss().backward()
    model.kfac.step()
    optimizer.step()
    optimizer.zero_grad()


POLAR_EXPRESS = "contract.standins_muon.polar_express"
NVIDIA = "contract.standins_muon.newton_schulz"
JORDANS = "contract.standins_muon.zeropower_via_newtonschulz5"

_SHAMPOO = (
    "For facebookresearch/optimizers on one device; the second moment is what its factors imply; bias correction and grafting left out."
)
_DION = "For microsoft/dion; heads, row blocks and shards left out."
_NVIDIA = "For NVIDIA-NeMo/Emerging-Optimizers; its iteration's bfloat16 left out."
_SOAP = "For nikhilvyas/SOAP as it is now; bias correction left out; the mean of its second moment is that of any basis."

CASES = (
    Case("Distributed Shampoo", "stand-in", with_adamw(lambda ps: DistributedShampoo(ps, weight_decay=0.1)), shampoo, only=is_hidden, note=_SHAMPOO),
    Case(
        "Dion", "stand-in", with_adamw(lambda ps: Dion(ps, weight_decay=0.1)), only=is_hidden,
        note="For microsoft/dion, whose QR is randomised; the momentum is read after error feedback.",
    ),
    Case("Muon (dion)", "stand-in", with_adamw(DionMuon), heavy_ball, newton_schulz=POLAR_EXPRESS, only=is_hidden, note=_DION),
    Case(
        "Muon (dion), Nesterov", "stand-in", with_adamw(lambda ps: DionMuon(ps, nesterov=True, adjust_lr="rms_norm")), heavy_ball,
        newton_schulz=POLAR_EXPRESS, only=is_hidden, note=_DION,
    ),
    Case("NorMuon (dion)", "stand-in", with_adamw(DionNorMuon), heavy_ball, newton_schulz=POLAR_EXPRESS, replay=False, only=is_hidden, note=_DION),
    Case("Muon (NVIDIA)", "stand-in", with_adamw(NvidiaMuon), lambda name, shape: average(0.95), newton_schulz=NVIDIA, only=is_hidden, note=_NVIDIA),
    Case(
        "Muon (NVIDIA), Nesterov", "stand-in", with_adamw(lambda ps: NvidiaMuon(ps, nesterov=True, scale_mode="unit_rms_norm", lr=0.01)),
        lambda name, shape: average(0.95), newton_schulz=NVIDIA, only=is_hidden, note=_NVIDIA,
    ),
    Case(
        "AdaptiveMuon (NVIDIA)", "stand-in", with_adamw(AdaptiveMuon), lambda name, shape: average(0.95), newton_schulz=NVIDIA, replay=False,
        only=is_hidden, note=_NVIDIA,
    ),
    Case(
        "AdaptiveMuon (NVIDIA), by rows or columns", "stand-in", with_adamw(lambda ps: AdaptiveMuon(ps, nesterov=True, moment2_method="normuon")),
        lambda name, shape: average(0.95), newton_schulz=NVIDIA, replay=False, only=is_hidden, note=_NVIDIA,
    ),
    Case("SOAP (official)", "stand-in", with_adamw(SOAP), soap, only=is_hidden, note=_SOAP),
    Case("SOAP (official), long axes", "stand-in", with_adamw(lambda ps: SOAP(ps, max_precond_dim=32)), soap, only=is_hidden, note=_SOAP),
    Case(
        "MARS-M (official)", "stand-in", lambda model: MarsM(hidden(model), others(model)), mars_m, newton_schulz=JORDANS,
        note="For AGI-Arena/MARS, `optimizers/mars_m.py`; the parameters it leaves to AdamW have no geometry.",
    ),
    Case(
        "K-FAC", "stand-in", _with_kfac, lambda name, shape: sgd(momentum=0.9, decay=0.01), step=_precondition_and_step,
        note="For gpauloski/kfac-pytorch, `kl_clip` left out; what is read is the optimizer it feeds, and the gradient is the preconditioned one.",
    ),
)  # fmt: skip
