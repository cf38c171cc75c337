"""Rows for the Muon family of pytorch_optimizer, and for its Scion.

Groups with `use_muon=False` run AdamW. The library writes coupled decay, the sign under `maximize` and the Nesterov mixing
into p.grad; here they are repeated on the copied gradient, bit for bit.
"""

from collections.abc import Callable
from dataclasses import replace
from math import nan, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from ...diagnostics.newton_schulz.families import JORDAN, repeat_last
from ...diagnostics.quantities.problem import NewtonSchulz
from .adapter import Adapter, Group, Orthogonalisation, Reader, Reading, SecondMoment, adam_update, entry, number, second_moment
from .muons import scaled_output
from .pytorch_optimizer import averages, debias_factors, decay_of
from .table import Row
from .torch_optim import as_triples

_EPS = 1e-7  # the iteration's default, which none of the optimizers changes


def _gradient(reading: Reading) -> Tensor | None:
    """The gradient as the momentum sees it: negated under `maximize`, with coupled decay added."""
    gradient, group = reading.gradient, reading.group
    if gradient is None:
        return None
    gradient = -gradient if getattr(reading.optimizer, "maximize", False) else gradient
    coupled = 0.0 if group["weight_decouple"] or group.get("constraint") else number(group["weight_decay"])
    return gradient.add(reading.weight, alpha=coupled) if coupled > 0 else gradient


def _mixed(reading: Reading) -> Tensor | None:
    """lerp(g, M, μ) under Nesterov, else M."""
    momentum: Tensor | None = reading.state.get("momentum_buffer")
    if momentum is None or not reading.group["nesterov"]:
        return momentum
    gradient = _gradient(reading)
    return None if gradient is None else gradient.lerp(momentum, reading.group["momentum"])


def _settings(reading: Reading) -> NewtonSchulz:
    """The group's list, which is what the constructor made of a preset's name; the last triple repeats."""
    coefficients = reading.group["ns_coeffs"]
    if isinstance(coefficients, str):  # set in the group later on
        from pytorch_optimizer.optimizer.utils.matrix import get_newton_schulz_weights

        coefficients = get_newton_schulz_weights(coefficients)
    return NewtonSchulz(repeat_last(as_triples(coefficients), int(reading.group["ns_steps"])), _EPS)


def _shape_scale(reading: Reading, rows: int, cols: int) -> float:
    return 0.2 * sqrt(max(rows, cols)) if reading.group["use_adjusted_lr"] else sqrt(max(1, rows / cols))


def _output_scale(reading: Reading, rows: int, cols: int) -> float:
    """NaN where a cautious mask follows the iteration."""
    return nan if reading.group.get("cautious") else _shape_scale(reading, rows, cols)


def _target(reading: Reading, rows: int, cols: int) -> float:
    return _shape_scale(reading, rows, cols) / sqrt(max(rows, cols))


def _iteration(reading: Reading, matrix: Tensor) -> Tensor:
    """The library's, one matrix at a time; it runs those of one shape together, which may round differently."""
    from pytorch_optimizer.optimizer.utils import matrix as functions

    group, flat = reading.group, matrix.reshape(len(matrix), -1)
    settings: dict[str, Any] = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"]}
    with torch.no_grad():
        if group.get("ns_method") == "gram_newton_schulz":
            return functions.zero_power_via_gram_newton_schulz(flat, reset_steps=group["ns_reset_steps"], **settings)
        return functions.zero_power_via_newton_schulz_5(flat, **settings)


def _adamw_update(reading: Reading) -> Tensor | None:
    """m̂/(√v̂ + ε), in float32."""
    state = reading.state
    if "exp_avg" not in state:
        return None
    first, second = debias_factors(reading)
    return adam_update(state["exp_avg"], state["exp_avg_sq"], first, second, reading.group["eps"])


_ADAMW = Adapter(
    "first moment exp_avg after the step; the optimizer does not orthogonalise this group",
    momentum=entry("exp_avg"),
    second_moment=second_moment("exp_avg_sq"),
    averages=averages(),
    decoupled_decay=decay_of,
    intended=_adamw_update,
)


def _or_adamw(orthogonalising: Adapter) -> Row:
    return lambda group: orthogonalising if group["use_muon"] else _ADAMW


def _scaled(what: str, ns_input: Reader) -> Adapter:
    """A Muon in whose step only a scale follows the iteration."""
    orthogonalisation = Orthogonalisation(ns_input, _settings, _output_scale, _target)
    return Adapter(
        f"exact NS input: {what}, before the cast to the iteration's format",
        momentum=entry("momentum_buffer"),
        decoupled_decay=decay_of,
        intended=scaled_output(_iteration, orthogonalisation),
        orthogonalisation=orthogonalisation,
    )


# An elementwise division follows the iteration, and the norm is restored.


def _adamuon_second_moment(reading: Reading) -> SecondMoment | None:
    """The average of O², kept flat."""
    values: Tensor | None = reading.state.get("v")
    return None if values is None else SecondMoment(values.reshape(reading.weight.shape), "of_orthogonalised")


def _normuon_target(reading: Reading, rows: int, cols: int) -> float:
    """O/√v is brought back to the norm that O had, or to RMS 0.2."""
    return 0.2 if reading.group["update_scale"] == "match_rms" else _target(reading, rows, cols)


def _normuon_scale(reading: Reading, rows: int, cols: int) -> float:
    """That of Muon; missing where O is brought to another norm, which its own is not told from."""
    return nan if reading.group["update_scale"] == "match_rms" else _output_scale(reading, rows, cols)


def _normuon_divisors(reading: Reading) -> Tensor | None:
    """√v + ε of every row, v being the average of their mean squares that this step has left."""
    v = reading.state.get("second_momentum_buffer")
    return None if v is None else v.sqrt() + number(reading.group["eps"])


def _no_scale(reading: Reading, rows: int, cols: int) -> float:
    return nan


# AdaGO's step is min(‖g‖, γ)/Σmin(‖g‖, γ)², and no smaller than ε, times the learning rate.


def _adago_scale(reading: Reading, rows: int, cols: int) -> float:
    group, lr = reading.group, number(reading.group["lr"])
    gradient, total = _mixed(reading) if group["nesterov"] else _gradient(reading), reading.state.get("v")
    if gradient is None or total is None or not lr or group.get("cautious"):
        return nan
    length = min(float(gradient.float().norm()), float(group["gamma"]))
    return max(lr * _shape_scale(reading, rows, cols) * length / float(total), float(group["eps"])) / lr


# Scion: the direction of steepest descent under a norm; where that is the spectral norm, O.

_AUTO, _SPECTRAL, _SPECTRAL_CONV = 1, 2, 3  # of LMONorm


def _scion_scale(reading: Reading, rows: int, cols: int) -> float:
    """scale·√(d_out/d_in), over a kernel's volume for convolutions."""
    group, shape = reading.group, reading.weight.shape
    options, kind = group["norm_kwargs"], group["norm_type"]
    scale = sqrt(shape[0] / shape[1])
    if kind == _SPECTRAL_CONV or (kind == _AUTO and len(shape) > 2):
        return float(group["scale"]) * scale / prod(shape[2:])
    if kind == _SPECTRAL:
        scale = scale if options.get("normalize", True) else sqrt(shape[0])
        scale = max(1.0, scale) if options.get("max_scale") else scale
    return float(group["scale"]) * scale


def _scion_settings(reading: Reading) -> NewtonSchulz:
    group = reading.group
    steps = 5 if group["norm_type"] == _AUTO else group["norm_kwargs"].get("num_steps", 5)
    return NewtonSchulz(repeat_last((JORDAN,), steps), _EPS)


def _scion_iteration(reading: Reading, matrix: Tensor) -> Tensor:
    from pytorch_optimizer.optimizer.utils import matrix as functions

    with torch.no_grad():
        return functions.zero_power_via_newton_schulz_5(matrix.reshape(len(matrix), -1), len(_scion_settings(reading).coefficients))


def _scion_decay(reading: Reading) -> float:
    """Under `constraint` W shrinks by 1 − η towards the ball's centre, and weight decay does nothing."""
    return 1.0 if reading.group["constraint"] else decay_of(reading)


def _scion(what: str, momentum: Reader) -> Callable[[Group], Adapter]:
    orthogonalisation = Orthogonalisation(momentum, _scion_settings, _scion_scale)
    spectral = Adapter(
        f"exact NS input: {what}, before the cast to bfloat16",
        momentum=momentum,
        decoupled_decay=_scion_decay,
        intended=scaled_output(_scion_iteration, orthogonalisation),
        orthogonalisation=orthogonalisation,
    )
    other = Adapter(f"{what}; this group's norm is not a spectral one", momentum=momentum, decoupled_decay=_scion_decay)
    return lambda group: spectral if group["norm_type"] in (_AUTO, _SPECTRAL, _SPECTRAL_CONV) else other


_MOMENTUM = entry("momentum_buffer")


def _qk_clip(reading: Reading) -> Tensor:
    """QK-Clip's factor of every row, (τ/max(logit, τ))ᵉ of its head; 1 where this step clips nothing of the matrix. Kimi K2, arXiv 2507.20534, Algorithm 1."""
    group, role, of_attentions = reading.group, reading.group.get("qk_clip"), reading.arguments.get("attention_max_logits")
    if role in (None, "key_rotary") or of_attentions is None or group["attention_name"] not in of_attentions:
        return torch.ones(())
    alpha, tau, weight = group["qk_clip_alpha"], group["qk_clip_threshold"], reading.weight
    logits = of_attentions[group["attention_name"]].detach().to(weight.device, torch.float32)
    of_heads: Tensor = (tau / logits.clamp_min(tau)) ** {"query": alpha, "key": 1 - alpha, "query_rotary": 1.0}[role]
    of_rows = of_heads.to(weight.dtype).repeat_interleave(len(weight) // len(of_heads))
    return of_rows.reshape(-1, *[1] * (weight.ndim - 1))


_MUON_CLIP = replace(_scaled("momentum after the step, a sum", _MOMENTUM), weight_factor=_qk_clip)
_CLIPPED_ADAMW = replace(_ADAMW, weight_factor=_qk_clip)


def _muon_clip(group: Group) -> Adapter:
    return _MUON_CLIP if group["use_muon"] else _CLIPPED_ADAMW


_ADAGO = Orthogonalisation(_mixed, _settings, _adago_scale)

_MUONS: dict[str, Adapter] = {
    "muon.Muon": _scaled("momentum after Nesterov mixing", _mixed),
    "adamuon.AdaMuon": Adapter(
        "exact NS input: momentum after the step, before the cast to bfloat16",
        momentum=entry("m"),
        second_moment=_adamuon_second_moment,
        decoupled_decay=decay_of,
        orthogonalisation=Orthogonalisation(entry("m"), _settings, _no_scale, _target),
    ),
    "normuon.NorMuon": Adapter(
        "exact NS input: momentum after Nesterov mixing, before the cast to bfloat16",
        momentum=_MOMENTUM,
        second_moment=second_moment("second_momentum_buffer", "of_orthogonalised"),
        decoupled_decay=decay_of,
        orthogonalisation=Orthogonalisation(_mixed, _settings, _normuon_scale, _normuon_target, _normuon_divisors),
    ),
    "adago.AdaGO": Adapter(
        "exact NS input: momentum after the step, or after Nesterov mixing, before the cast to bfloat16",
        momentum=_MOMENTUM,
        second_moment=second_moment("v", "scalar"),  # the sum of ‖g‖², not averaged over coordinates
        decoupled_decay=decay_of,
        intended=scaled_output(_iteration, _ADAGO),
        orthogonalisation=_ADAGO,
    ),
}

ROWS: dict[str, Row] = {
    **{f"pytorch_optimizer.optimizer.muon.{name}": _or_adamw(adapter) for name, adapter in _MUONS.items()},
    "pytorch_optimizer.optimizer.muon.muon_clip.MuonClip": _muon_clip,
    "pytorch_optimizer.optimizer.scion.SCION": _scion("momentum d after the step", entry("d")),
    # Its momentum is p.grad itself, which is not to be zeroed: Σ(1 − μ)ᵏg, complete at the beginning of the step.
    "pytorch_optimizer.optimizer.scion.SCIONLight": _scion("momentum that p.grad sums up, before the step", _gradient),
}
