"""The table of published Muons that no row of the adapter table knows: how each stand-in is built, and what is true of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from contract.harness import hidden, others
from torch import nn

from watching import standins
from watching.generator import JORDAN, POLAR_EXPRESS, Triple


@dataclass(frozen=True)
class StandIn:
    """One optimizer, and what is true of it.

    Attributes:
        build: for the parameters of a model.
        says: what stands in `spectrum_of` of the group of the matrices.
        triples: of every step.
        then: what follows the iteration of each kind of matrix.
        scale: s in ΔW = −η·s·O of a matrix; None where that is not one number.
        decays: kinds of decay that may be told.
        keeps_grad: p.grad is not cleared between steps.
    """

    build: Callable[[nn.Module], Any]
    says: str
    triples: tuple[Triple, ...] = (JORDAN[0],) * 5
    then: tuple[str, ...] = ("scale",)
    scale: Callable[[int, int], float] | None = None
    decays: tuple[str, ...] = ("decoupled",)
    keeps_grad: bool = False


def nanochat(model: nn.Module) -> Any:
    shapes = dict.fromkeys(p.shape for p in hidden(model))
    muon = {"kind": "muon", "lr": 0.02, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.2}
    groups = [{"params": [p for p in hidden(model) if p.shape == shape], **muon} for shape in shapes]
    return standins.NanochatMuonAdamW([*groups, {"params": others(model), "kind": "adamw", "lr": 0.01, "weight_decay": 0.1}])


def muon_clip(model: nn.Module) -> Any:
    """Of whose two heads in each attention one is clipped at every step."""
    matrices = dict(model.named_parameters())
    attention = [(p, matrices[name.replace("q_proj", "k_proj")]) for name, p in matrices.items() if "q_proj" in name]
    optimizer = standins.ClippingMuon(hidden(model), attention, "heads", **KELLER_JORDAN)
    optimizer.logits = [torch.tensor([60.0, 121.0])] * len(attention)
    return optimizer


def of_hidden(cls: Any, **settings: Any) -> Callable[[nn.Module], Any]:
    return lambda model: cls(hidden(model), **settings)


KELLER_JORDAN = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.5}
SCION = {"lr": 2**-6, "momentum": 0.1, "scale": 5.0}
MIXED = "momentum after Nesterov mixing, (1 − μ)g + μM (momentum_buffer, μ: momentum)"
STAND_INS = {
    "KellerJordan": StandIn(of_hidden(standins.KellerJordanMuon, **KELLER_JORDAN), MIXED, scale=lambda m, n: max(1, m / n) ** 0.5),
    "Moonlight": StandIn(
        lambda model: standins.MoonlightMuon(hidden(model), others(model)), "momentum after Nesterov mixing, g + μM (momentum_buffer, μ: momentum)",
        scale=lambda m, n: 0.2 * math.sqrt(max(m, n)),
    ),
    "AdaMuon": StandIn(of_hidden(standins.AuthorsAdaMuon), f"sign of {MIXED}", then=("elements",), decays=("none seen", "decoupled")),
    "Scion": StandIn(
        of_hidden(standins.LionsScion, **SCION), "momentum after the step (momentum_buffer)", scale=lambda m, n: 5 * math.sqrt(m / n)
    ),
    "ScionLight": StandIn(of_hidden(standins.LionsScionLight, **SCION), "gradient", scale=lambda m, n: 5 * math.sqrt(m / n), keeps_grad=True),
    "MuonClip": StandIn(muon_clip, MIXED, scale=lambda m, n: max(1, m / n) ** 0.5),
    "hyperball": StandIn(of_hidden(standins.HyperballMuon, **KELLER_JORDAN), MIXED, decays=("none seen",)),
    "Muown": StandIn(
        of_hidden(standins.MuownLike, **KELLER_JORDAN), "momentum after the step (momentum_buffer)", then=("rows", "elements"),
        decays=("none seen", "decoupled", "cautious"),
    ),
    "Aurora": StandIn(of_hidden(standins.AuroraLike, **KELLER_JORDAN), MIXED, then=("scale", "rows")),
    "Muon+": StandIn(of_hidden(standins.MuonPlus, **KELLER_JORDAN), MIXED, decays=("none seen",)),
    "nanochat": StandIn(
        nanochat, "its rows brought to one norm", triples=tuple(POLAR_EXPRESS), then=("rows", "columns", "scale", "elements"),
        decays=("cautious", "none seen", "decoupled"),
    ),
}  # fmt: skip
