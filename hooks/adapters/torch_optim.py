"""Rows for the optimizers of `torch.optim`."""

from dataclasses import replace
from math import nan, sqrt
from typing import Any

import torch
from torch import Tensor

from ...diagnostics.newton_schulz.families import Coefficients, repeat_last
from ...diagnostics.quantities.problem import NewtonSchulz
from .adapter import (
    NOT_ORTHOGONAL,
    Adapter,
    Averages,
    Group,
    Orthogonalisation,
    Reading,
    SecondMoment,
    adam_update,
    corrected,
    entry,
    group_setting,
    number,
    second_moment,
    uncorrected,
)
from .muons import scaled_output, torch_iteration
from .table import Row


def _muon_ns_input(reading: Reading) -> Tensor:
    """What torch.optim.Muon passes to its iteration: buf ← lerp(buf, g, 1 − μ); lerp(g, buf, μ) if nesterov, else buf.

    Built before the step, since with bfloat16 parameters and nesterov=False the step overwrites its own buffer.
    """
    gradient, group = reading.gradient, reading.group
    assert gradient is not None
    buffer = reading.state.get("momentum_buffer")
    buffer = torch.zeros_like(gradient) if buffer is None else buffer
    buffer = buffer.lerp(gradient, 1 - group["momentum"])
    return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def _muon_settings(reading: Reading) -> NewtonSchulz:
    group = reading.group
    return NewtonSchulz(repeat_last(as_triples(group["ns_coefficients"]), int(group["ns_steps"])), float(group["eps"]))


def as_triples(coefficients: Any) -> Coefficients:
    """One triple, or one triple per step, as a tuple of triples."""
    rows = coefficients if isinstance(coefficients[0], (tuple, list)) else (coefficients,)
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)


def _muon_output_scale(reading: Reading, rows: int, cols: int) -> float:
    match reading.group["adjust_lr_fn"]:
        case None | "original":
            return sqrt(max(1, rows / cols))
        case "match_rms_adamw":
            return 0.2 * sqrt(max(rows, cols))
        case _:
            return 1.0


def _adam_decay(reading: Reading) -> float:
    return number(reading.group["weight_decay"]) if reading.group.get("decoupled_weight_decay") else 0.0


def _adam_second_moment(reading: Reading) -> SecondMoment | None:
    """exp_avg_sq; under AMSGrad what the update divides by, its running maximum."""
    values = reading.state.get("max_exp_avg_sq", reading.state.get("exp_avg_sq"))
    return None if values is None else SecondMoment(values, "full")


def _adam_update(reading: Reading) -> Tensor | None:
    """m̂/(√v̂ + ε), in float32."""
    moment, v = reading.state.get("exp_avg"), _adam_second_moment(reading)
    if moment is None or v is None:
        return None
    beta1, beta2 = (float(beta) for beta in reading.group["betas"])
    step = float(reading.state["step"])
    # Under `maximize` the moment is already one of −g.
    return adam_update(moment, v.values, 1 - beta1**step, 1 - beta2**step, reading.group["eps"])


def _adamax_second_moment(reading: Reading) -> SecondMoment | None:
    """The square of u = max(β₂u, |g| + ε): what the update divides by is its root, as for any second moment."""
    largest = reading.state.get("exp_inf")
    return None if largest is None else SecondMoment(largest.square(), "full")


def _adamax_update(reading: Reading) -> Tensor | None:
    """m̂/u, in float32."""
    moment, largest = reading.state.get("exp_avg"), reading.state.get("exp_inf")
    if moment is None or largest is None:
        return None
    beta1 = float(reading.group["betas"][0])
    update: Tensor = moment.float() / (1 - beta1 ** float(reading.state["step"])) / largest.float()
    return update


def _adagrad_rate(reading: Reading) -> float:
    """η/(1 + (t − 1)·lr_decay)."""
    return number(reading.group["lr"]) / (1 + (number(reading.state.get("step")) - 1) * number(reading.group["lr_decay"]))


def _adagrad_update(reading: Reading) -> Tensor | None:
    """(g + λw)/(√sum + ε), in float32."""
    return _divided(reading, reading.state.get("sum"), float(reading.group["eps"]))


def _sgd_update(reading: Reading) -> Tensor | None:
    """The momentum, or the gradient with coupled decay; not under Nesterov's rule, which mixes the two."""
    if reading.group["momentum"]:
        return None if reading.group["nesterov"] else entry("momentum_buffer")(reading)
    return _decayed(reading)


def _decayed(reading: Reading) -> Tensor | None:
    """g + λw in float32, of −g where the optimizer maximises."""
    if reading.gradient is None:
        return None
    gradient = -reading.gradient.float() if reading.group.get("maximize") else reading.gradient.float()
    return gradient.add(reading.weight.float(), alpha=number(reading.group["weight_decay"]))


def _divided(reading: Reading, v: Tensor | None, eps: float) -> Tensor | None:
    """The gradient, with coupled decay, over √v + ε."""
    gradient = _decayed(reading)
    return None if v is None or gradient is None else gradient / (v.float().sqrt() + eps)


def _rmsprop(group: Group) -> Adapter:
    """Momentum here accumulates what is left of gradients after the division; centred, their average is kept beside it."""
    if group.get("momentum"):
        momentum, buffer = entry("momentum_buffer"), "momentum_buffer after the step, a sum of gradients already divided by their RMS"
    elif group.get("centered"):
        momentum, buffer = entry("grad_avg"), "average of gradients grad_avg after the step"
    else:
        momentum, buffer = entry("momentum_buffer"), "gradient; this RMSprop keeps no momentum"

    def intended(reading: Reading) -> Tensor | None:
        if group.get("momentum"):
            return entry("momentum_buffer")(reading)
        return None if group.get("centered") else _divided(reading, reading.state.get("square_avg"), float(group["eps"]))

    def averages(reading: Reading) -> Averages:
        # The divisor of the centred one is another: v less the square of the average.
        return Averages() if group.get("centered") else Averages(second=1.0, eps=number(group["eps"]))

    return Adapter(
        f"{buffer}; {NOT_ORTHOGONAL}", momentum=momentum, second_moment=second_moment("square_avg"), averages=averages, intended=intended
    )


def _asgd_rate(reading: Reading) -> float:
    """η_t, which the state holds as it was before the step; the step ends with computing the next one."""
    return number(reading.before)


_NO_MOMENTUM = f"gradient; the optimizer keeps no first moment; {NOT_ORTHOGONAL}"

ADAM = Adapter(
    f"first moment exp_avg after the step; {NOT_ORTHOGONAL}",
    momentum=entry("exp_avg"),
    second_moment=_adam_second_moment,
    averages=corrected(),
    decoupled_decay=_adam_decay,
    intended=_adam_update,
)

_MUON = Orthogonalisation(lambda reading: reading.before, _muon_settings, _muon_output_scale)

ROWS: dict[str, Row] = {
    "torch.optim.Muon": Adapter(
        "exact NS input: momentum after Nesterov mixing, before the cast to bfloat16",
        momentum=entry("momentum_buffer"),
        decoupled_decay=group_setting("weight_decay"),
        intended=scaled_output(torch_iteration, _MUON),
        orthogonalisation=_MUON,
        before=_muon_ns_input,
    ),
    "torch.optim.adamw.AdamW": ADAM,
    "torch.optim.adam.Adam": ADAM,
    "torch.optim.sgd.SGD": Adapter(
        f"momentum_buffer after the step, the gradient where there is no momentum; {NOT_ORTHOGONAL}",
        momentum=entry("momentum_buffer"),
        intended=_sgd_update,
    ),
    "torch.optim.nadam.NAdam": replace(ADAM, intended=lambda reading: None),
    "torch.optim.radam.RAdam": replace(ADAM, averages=corrected(as_a_whole=True), intended=lambda reading: None),
    "torch.optim.adamax.Adamax": Adapter(
        f"first moment exp_avg after the step; {NOT_ORTHOGONAL}",
        momentum=entry("exp_avg"),
        second_moment=_adamax_second_moment,
        averages=lambda reading: replace(corrected()(reading), second=1.0, eps=nan),  # ε is within u
        intended=_adamax_update,
    ),
    "torch.optim.adagrad.Adagrad": Adapter(
        _NO_MOMENTUM, second_moment=second_moment("sum"), averages=uncorrected, learning_rate=_adagrad_rate, intended=_adagrad_update
    ),
    "torch.optim.rmsprop.RMSprop": _rmsprop,
    # acc_delta, as non-negative, is of updates.
    "torch.optim.adadelta.Adadelta": Adapter(
        _NO_MOMENTUM,
        second_moment=second_moment("square_avg"),
        averages=lambda reading: Averages(second=1.0, eps=sqrt(number(reading.group["eps"]))),  # of √(v + ε)
    ),
    # ax is an average of the weights.
    "torch.optim.asgd.ASGD": Adapter(
        _NO_MOMENTUM,
        learning_rate=_asgd_rate,
        decoupled_decay=group_setting("lambd"),
        before=lambda reading: float(reading.state.get("eta", reading.group["lr"])),
    ),
    # Every coordinate has a step size of its own; lr is only what they begin with. prev is the last gradient.
    "torch.optim.rprop.Rprop": Adapter(_NO_MOMENTUM, learning_rate=lambda reading: nan),
}
