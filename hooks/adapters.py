"""Where each optimizer keeps what: one row per optimizer class, matched by name so that no library is imported for it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..diagnostics.ns_families import Coefficients, repeat_last
from ..diagnostics.observation import NewtonSchulz

Group: TypeAlias = Mapping[str, Any]  # a parameter group
State: TypeAlias = Mapping[str, Any]  # the optimizer's state of one parameter; empty before its first step


@dataclass(frozen=True)
class Orthogonalisation:
    """The Newton–Schulz part of a Muon-type optimizer.

    Attributes:
        ns_input: the exact NS input of the coming step as a new tensor, from gradient, state and group before the step.
        settings: coefficients of every step and eps.
        output_scale: s(rows, cols) in ΔW = −η·s·O.
    """

    ns_input: Callable[[Tensor, State, Group], Tensor]
    settings: Callable[[Group], NewtonSchulz]
    output_scale: Callable[[Group, int, int], float]


@dataclass(frozen=True)
class Adapter:
    """How to read one optimizer class.

    Attributes:
        momentum: first-moment state after the step, None where there is none.
        decoupled_decay: λ in W(1 − ηλ), 0 where weight decay is coupled to the gradient, NaN where that is not known.
        spectrum_of: what the group `geometry` describes, in words; written into the run.
        orthogonalisation: None where the optimizer does not orthogonalise.
    """

    momentum: Callable[[State], Tensor | None]
    decoupled_decay: Callable[[Group], float]
    spectrum_of: str
    orthogonalisation: Orthogonalisation | None = None


def _entry(key: str) -> Callable[[State], Tensor | None]:
    return lambda state: state.get(key)


def number(setting: Any) -> float:
    """A group's setting as a number; NaN for what is none (optimizers that find their own learning rate set lr=None)."""
    try:
        return float(setting)
    except (TypeError, ValueError):
        return float("nan")


def _muon_ns_input(gradient: Tensor, state: State, group: Group) -> Tensor:
    """What torch.optim.Muon passes to its iteration: buf ← lerp(buf, g, 1 − μ); lerp(g, buf, μ) if nesterov, else buf.

    Built before the step, since with bfloat16 parameters and nesterov=False the step overwrites its own buffer.
    """
    buffer = state.get("momentum_buffer")
    buffer = torch.zeros_like(gradient) if buffer is None else buffer
    buffer = buffer.lerp(gradient, 1 - group["momentum"])
    return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def _muon_settings(group: Group) -> NewtonSchulz:
    return NewtonSchulz(repeat_last(as_triples(group["ns_coefficients"]), int(group["ns_steps"])), float(group["eps"]))


def as_triples(coefficients: Any) -> Coefficients:
    """A group's `ns_coefficients`, one triple (torch) or one triple per step (an applied schedule), as a tuple of triples."""
    rows = coefficients if isinstance(coefficients[0], (tuple, list)) else (coefficients,)
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)


def _muon_output_scale(group: Group, rows: int, cols: int) -> float:
    match group["adjust_lr_fn"]:
        case None | "original":
            return sqrt(max(1, rows / cols))
        case "match_rms_adamw":
            return 0.2 * sqrt(max(rows, cols))
        case _:
            return 1.0


def _adam_decay(group: Group) -> float:
    return number(group["weight_decay"]) if group.get("decoupled_weight_decay") else 0.0


_ADAM = Adapter(_entry("exp_avg"), _adam_decay, "first moment exp_avg after the step; the optimizer does not orthogonalise")

ADAPTERS: dict[str, Adapter] = {
    "torch.optim.Muon": Adapter(
        _entry("momentum_buffer"),
        lambda group: number(group["weight_decay"]),
        "exact NS input: momentum after Nesterov mixing, before the cast to bfloat16",
        Orthogonalisation(_muon_ns_input, _muon_settings, _muon_output_scale),
    ),
    "torch.optim.adamw.AdamW": _ADAM,
    "torch.optim.adam.Adam": _ADAM,
    "torch.optim.sgd.SGD": Adapter(
        _entry("momentum_buffer"),
        lambda group: 0.0,
        "momentum_buffer after the step, the gradient where there is no momentum; the optimizer does not orthogonalise",
    ),
}

UNKNOWN = Adapter(
    lambda state: None,
    lambda group: float("nan") if group.get("weight_decay") else 0.0,
    "gradient; this optimizer class is not known, its moments and the kind of its weight decay are not read",
)


def adapter_for(optimizer: object) -> Adapter:
    """The row of the optimizer's class, or of a base class whose `step` it inherits; :data:`UNKNOWN` where there is none.

    A subclass with a `step` of its own may do anything with the state it inherits.
    """
    for cls in type(optimizer).__mro__:
        if (adapter := ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
            # torch wraps `step` per class, to run hooks; what is compared is the function within.
            return adapter if inspect.unwrap(type(optimizer).step) is inspect.unwrap(cls.step) else UNKNOWN  # type: ignore[attr-defined]
    return UNKNOWN
