"""Cases for the optimizers that orthogonalise: torch's, Keller Jordan's and heavyball's."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.optim import AdamW, Muon

from contract.harness import Case, Transcription, hidden, is_hidden, others, plain_step
from contract.transcriptions import adam
from contract.transcriptions_muon import muon

_TORCH = "torch.optim._muon._zeropower_via_newtonschulz"
_KELLER_JORDAN = "muon.zeropower_via_newtonschulz5"
_HEAVYBALL = "heavyball.utils.zeropower_via_newtonschulz5"

# O is scaled while it is bfloat16: half of its last place is 2⁻⁹.
SCALED_IN_BFLOAT16 = 2e-3


def torch_muon(**settings: Any) -> Callable[[nn.Module], Any]:
    """torch's Muon for the hidden matrices, AdamW for the rest."""
    return lambda model: [Muon(hidden(model), lr=0.02, **settings), AdamW(others(model), lr=1e-3)]


def in_bfloat16(**settings: Any) -> Callable[[nn.Module], Any]:
    """The same, of a model whose weights are bfloat16."""
    return lambda model: torch_muon(**settings)(model.bfloat16())


def or_adam(of_hidden: Callable[[], Transcription], **of_rest: float) -> Callable[[str, tuple[int, ...]], Transcription]:
    """AdamW for what is no hidden matrix."""
    return lambda name, shape: of_hidden() if is_hidden(name) else adam(**of_rest)


def keller_jordan(name: str) -> Callable[[nn.Module], Any]:
    """The class that has one device, with or without its own Adam."""

    def build(model: nn.Module) -> Any:
        import muon as package

        if "Adam" not in name:
            return [getattr(package, name)(hidden(model), weight_decay=0.1), AdamW(others(model), lr=1e-3)]
        groups = [
            {"params": hidden(model), "use_muon": True, "weight_decay": 0.1},
            {"params": others(model), "use_muon": False, "lr": 1e-3},
        ]
        return getattr(package, name)(groups)

    return build


def heavyball(name: str, **settings: Any) -> Callable[[nn.Module], Any]:
    """One of heavyball's for the hidden matrices, AdamW for the rest."""

    def build(model: nn.Module) -> Any:
        import heavyball as package

        return [getattr(package, name)(hidden(model), **settings), AdamW(others(model), lr=1e-3)]

    return build


def not_compiled(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """heavyball compiles its pieces, which takes longer than all cases together, and hides the iteration."""
    from heavyball import utils

    with patch.object(utils, "compile_mode", None):
        plain_step(optimizer, model, loss)


CASES = [
    Case(
        "Muon (torch)",
        "torch",
        torch_muon(),
        lambda name, shape: muon(),
        only=is_hidden,
        newton_schulz=_TORCH,
    ),
    Case(
        "Muon (torch), no Nesterov momentum",
        "torch",
        torch_muon(nesterov=False, momentum=0.9, ns_coefficients=(2.0, -1.5, 0.5), ns_steps=7),
        lambda name, shape: muon(0.9),
        only=is_hidden,
        newton_schulz=_TORCH,
    ),
    Case(
        "Muon (Moonlight)",
        "torch",
        torch_muon(adjust_lr_fn="match_rms_adamw"),
        lambda name, shape: muon(),
        only=is_hidden,
        newton_schulz=_TORCH,
    ),
    Case(
        "Muon (torch), bfloat16 weights",
        "torch",
        in_bfloat16(adjust_lr_fn="match_rms_adamw"),
        lambda name, shape: muon(),
        only=is_hidden,
        newton_schulz=_TORCH,
        momentum_bound=0.01,
        replay=False,
        note="The momentum is kept in bfloat16; the applied update is recorded beside the intended one.",
    ),
    Case(
        "Muon (torch), bfloat16 weights, no Nesterov momentum",
        "torch",
        in_bfloat16(nesterov=False),
        newton_schulz=_TORCH,
        replay=False,
        note="torch 2.13 overwrites the momentum with X₀ then, which is what is read of it after the step; the NS input is built before.",
    ),
    Case(
        "Muon (Keller Jordan)",
        "muon-optimizer",
        keller_jordan("SingleDeviceMuon"),
        lambda name, shape: muon(),
        only=is_hidden,
        newton_schulz=_KELLER_JORDAN,
        update_bound=SCALED_IN_BFLOAT16,
    ),
    Case(
        "Muon (Keller Jordan), with Adam",
        "muon-optimizer",
        keller_jordan("SingleDeviceMuonWithAuxAdam"),
        or_adam(muon, beta2=0.95, eps=1e-10),
        newton_schulz=_KELLER_JORDAN,
        update_bound=SCALED_IN_BFLOAT16,
        note="The class for several processes has the same row, and was not tried.",
    ),
    Case(
        "Muon (heavyball)",
        "heavyball",
        heavyball("Muon", lr=0.01, weight_decay=0.1, warmup_steps=3),
        lambda name, shape: muon(0.9),
        step=not_compiled,
        only=is_hidden,
        newton_schulz=_HEAVYBALL,
        note="p.grad is gone after its step; without the exact input where gradients are clipped first or kept in bfloat16.",
    ),
    Case(
        "Muon (heavyball), summed momentum",
        "heavyball",
        heavyball("Muon", lr=0.01, heavyball_momentum=True),
        lambda name, shape: muon(0.9, averaged=False),
        step=not_compiled,
        only=is_hidden,
        newton_schulz=_HEAVYBALL,
    ),
]
