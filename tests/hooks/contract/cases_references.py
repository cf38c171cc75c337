"""Cases for the Muon-type reference optimizers under examples/optimizers. What they do beyond this is tested beside them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from contract.harness import Case, hidden, is_hidden, others
from contract.transcriptions import ema_muon
from contract.transcriptions_references import adamuon, heavy_ball, mars_m

LR, DECAY = 0.02, 0.1


def with_adamw(name: str, **options: Any) -> Callable[[nn.Module], Any]:
    """The reference optimizer "module.Class" on hidden matrices and AdamW on the rest."""

    def build(model: nn.Module) -> Any:
        from importlib import import_module

        module, _, cls = name.partition(".")
        optimizer = getattr(import_module(f"optiscope.examples.optimizers.{module}"), cls)
        return [optimizer(hidden(model), lr=LR, weight_decay=DECAY, **options), AdamW(others(model), lr=1e-3)]

    return build


def teon(model: nn.Module) -> Any:
    """TEON with the matrices of one kind beside each other, as its stacks need them."""
    from optiscope.examples.optimizers.teon import TEON

    alike = [p for shape in {p.shape: None for p in hidden(model)} for p in hidden(model) if p.shape == shape]
    return [TEON(alike, lr=LR, momentum=0.95, weight_decay=DECAY), AdamW(others(model), lr=1e-3)]


def iteration(module: str, name: str = "orthogonalise") -> str:
    """Dotted name of the iteration as a module looks it up."""
    return f"optiscope.examples.optimizers.{module}.{name}"


CASES = [
    Case(
        "AMO", "optiscope", with_adamw("amo_muon.AMOMuon"), lambda name, shape: ema_muon(0.95),
        only=is_hidden, newton_schulz=iteration("amo_muon"), note="Muon whose groups carry steps and coefficients per operator.",
    ),
    Case(
        "AdaMuon v1", "optiscope", with_adamw("adamuon.AdaMuon", ns_dtype=torch.float32), lambda name, shape: adamuon(shape, sign=False),
        only=is_hidden, newton_schulz=iteration("adamuon"), replay=False, second_bound=1e-4,
        note="Second moment: squares of small entries of O, float32 against float64.",
    ),
    Case(
        "AdaMuon v2 and v3 (sign)", "optiscope", with_adamw("adamuon.AdaMuon", ns_dtype=torch.float32, sign=True),
        lambda name, shape: adamuon(shape, sign=True), only=is_hidden, newton_schulz=iteration("adamuon"), replay=False, second_bound=1e-4,
        note="The NS input is a matrix of signs.",
    ),
    Case("MARS-M", "optiscope", with_adamw("mars_m.MARSM"), lambda name, shape: mars_m(), only=is_hidden, newton_schulz=iteration("mars_m")),
    Case(
        "TEON", "optiscope", teon, lambda name, shape: heavy_ball(0.95), only=is_hidden,
        note="Geometry is of the stack [M_1 … M_K]; its NS input is compared in tests/examples/test_teon.py.",
    ),
    Case(
        "ROOT", "optiscope", with_adamw("root.ROOT"), lambda name, shape: heavy_ball(0.95), only=is_hidden, newton_schulz=iteration("root"),
        note="The NS input is the clipped momentum.",
    ),
    Case(
        "Turbo-Muon (AOL)", "optiscope", with_adamw("turbo_muon.TurboMuon"), None, only=is_hidden,
        newton_schulz=iteration("turbo_muon", "aol_orthogonalise"), note="Residuals are predicted from diag(d)·M, as the iteration starts.",
    ),
]  # fmt: skip
