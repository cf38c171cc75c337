"""Rows for optimizers that come in a package of their own, and for pytorch_optimizer's copies of two of them.

lion-pytorch, sophia-opt, adam-mini, galore-torch; prodigyopt, whose step size is a factor d of its own times lr; schedulefree, whose
weights in training are y, between the average x and the sequence z.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import nan, sqrt
from typing import Any

import torch
from torch import Tensor

from .adapter import (
    NOT_ORTHOGONAL,
    Adapter,
    Averages,
    Group,
    Reading,
    SecondMoment,
    corrected,
    entry,
    group_setting,
    number,
    second_moment,
    uncorrected,
)
from .table import Row

_MOMENT = f"first moment exp_avg after the step; {NOT_ORTHOGONAL}"
_DECAY = group_setting("weight_decay")


def _lion_decay(reading: Reading) -> float:
    """λ, or over the learning rate that the optimizer was made with, so that it does not depend on it."""
    optimizer = reading.optimizer
    return _DECAY(reading) / optimizer._init_lr if optimizer.decoupled_wd else _DECAY(reading)


def _sophia_clipped(reading: Reading) -> Tensor | None:
    """The applied update |m|/(ρ·B·h + 1e-15), clipped at 1 already: B is an argument of `step`, which nothing keeps.

    Read back from float32 weights it is right to about 1e-5, so what is within 1e-3 of the clip counts as clipped.
    """
    lr, weight = number(reading.group["lr"]), reading.weight.float()
    if not lr or torch.finfo(reading.weight.dtype).eps > 1e-6:
        return None
    return (weight * (1 - lr * _DECAY(reading)) - reading.parameter.detach().float()) / (lr * (1 - 1e-3))


# Adam-mini: one group per parameter, whose name says how it is cut into blocks.


def _mini_momentum(reading: Reading) -> Tensor | None:
    """m, kept by head where the second moment is."""
    moment: Tensor | None = reading.state.get("m")
    return None if moment is None else moment.reshape(reading.weight.shape)


def _mini_second_moment(reading: Reading) -> SecondMoment | None:
    """One number per row, per head of q and k, per tensor, or per coordinate of a bias."""
    state, shape = reading.state, reading.weight.shape
    if "v" in state:
        return SecondMoment(state["v"], "full")
    values = state.get("vmean")
    if values is None:
        return None
    return SecondMoment(values, "scalar" if not values.ndim else "row" if values.shape[0] == shape[0] else "block")


def _mini_update(reading: Reading) -> Tensor | None:
    """m̂/(√v̂ + ε), in float32."""
    moment, v, group = reading.state.get("m"), reading.state.get("v", reading.state.get("vmean")), reading.group
    if moment is None or v is None:
        return None
    step = reading.state["step"]
    first, second = 1 - group["beta1"] ** step, 1 - group["beta2"] ** step
    update: Tensor = (moment.float() / first) / ((v.float() / second).sqrt() + group["eps"])
    return update.reshape(reading.weight.shape)


# GaLore: moments of the gradient's projection to the singular vectors that it had some steps ago.


def _lifted(moment: Tensor, projector: Any, shape: Sequence[int]) -> Tensor:
    """A moment back in the parameter's shape. The projector's `scale` is of updates and left out."""
    basis, kind, tall = projector.ortho_matrix, projector.proj_type, shape[0] >= shape[1]
    if kind == "full":
        return torch.matmul(torch.matmul(basis[0], moment), basis[1])
    on_the_right = kind == "right" or (kind == "std" and tall) or (kind == "reverse_std" and not tall)
    return torch.matmul(moment, basis) if on_the_right else torch.matmul(basis, moment)


def _low_rank_momentum(reading: Reading) -> Tensor | None:
    moment, projector = reading.state.get("exp_avg"), reading.state.get("projector")
    return moment if projector is None or moment is None else _lifted(moment, projector, reading.weight.shape)


def _low_rank_second_moment(reading: Reading) -> SecondMoment | None:
    values, projected = reading.state.get("exp_avg_sq"), "projector" in reading.state
    if values is None:
        return None
    return SecondMoment(values, "projected", reading.state.get("exp_avg")) if projected else SecondMoment(values, "full")


def _galore_averages(reading: Reading) -> Averages:
    return corrected(as_a_whole=True)(reading) if reading.group["correct_bias"] else uncorrected(reading)


def _galore(group: Group) -> Adapter:
    where = "lifted from the gradient's low-rank subspace" if "rank" in group else "of every coordinate, as the group has no rank"
    return Adapter(
        f"first moment exp_avg after the step, {where}; {NOT_ORTHOGONAL}",
        momentum=_low_rank_momentum,
        second_moment=_low_rank_second_moment,
        averages=_galore_averages,
        decoupled_decay=_DECAY,  # taken from W after the update: a relative difference of ηλ
    )


# Prodigy: all groups share the first one's d and count; the moments are of d·g.


def _prodigy_rate(reading: Reading) -> float:
    """d·lr, d as it was before the step."""
    return number(reading.group["d"]) * max(number(group["lr"]) for group in reading.optimizer.param_groups)


def _prodigy_decay(reading: Reading) -> float:
    """Decay goes with the rate that the bias correction is a part of."""
    group = reading.group
    if not group["decouple"]:
        return 0.0
    return _DECAY(reading) * (_correction(group, int(group["k"]) + 1) if group["use_bias_correction"] else 1.0)


def _po_prodigy_rate(reading: Reading) -> float:
    return number(reading.group["d"]) * number(reading.optimizer.param_groups[0]["lr"])


def _po_prodigy_decay(reading: Reading) -> float:
    """As prodigyopt's, or fixed; coupled decay is added to a gradient that has done its work already: there is then none."""
    group = reading.group
    if not group["weight_decouple"]:
        return 0.0
    if group["fixed_decay"]:
        return _DECAY(reading) / (_po_prodigy_rate(reading) or nan)
    return _DECAY(reading) * (_correction(group, int(group["step"])) if group["bias_correction"] else 1.0)


def _correction(group: Group, step: int) -> float:
    """√(1 − β₂ᵗ)/(1 − β₁ᵗ)."""
    beta1, beta2 = group["betas"]
    return sqrt(1 - float(beta2) ** step) / (1 - float(beta1) ** step)


def _prodigy_averages(flag: str, step: Any, *, decay_in_gradient: bool) -> Any:
    """Of the averages of d·g and (d·g)²; √v + dε with the d that this step found, corrected as a whole."""

    def read(reading: Reading) -> Averages:
        first_group = reading.optimizer.param_groups[0]
        found = corrected(step, as_a_whole=True)(reading) if reading.group[flag] else uncorrected(reading)
        return replace(found, eps=found.eps * number(first_group["d"]), decay_in_gradient=decay_in_gradient)

    return read


def _prodigy(rate: Any, decay: Any, averages: Any) -> Adapter:
    return Adapter(
        f"first moment exp_avg after the step, of gradients times d; {NOT_ORTHOGONAL}",
        momentum=entry("exp_avg"),
        second_moment=second_moment("exp_avg_sq"),
        averages=averages,
        learning_rate=rate,
        decoupled_decay=decay,
    )


# Schedule-free: y ← (1 − c)y + cz − η(1 − β(1 − c))·(g/√v̂ + λy), z ← z − η(g/√v̂ + λy).


def _schedule_free_rate(reading: Reading) -> float:
    """η, in its linear warm-up."""
    group, step = reading.group, _step_of(reading)
    rising = step / int(group["warmup_steps"]) if step < group["warmup_steps"] else 1.0
    return number(group["lr"]) * rising


def _schedule_free_decay(reading: Reading) -> float:
    """λ(1 − β(1 − c)): what y itself loses in this step; z, towards which y moves, loses the share ηλ of y as well."""
    group, step = reading.group, _step_of(reading)
    highest = max(_schedule_free_rate(reading), number(group["lr_max"]))
    weight = step ** group["r"] * highest ** group["weight_lr_power"]
    total = number(group["weight_sum"]) + weight
    c = weight / total if total else 0.0
    if group.get("decoupling_c", 0.0) > 0:
        c = min(1.0, c * (1 - group["betas"][0]) * group["decoupling_c"])
    return _DECAY(reading) * (1 - number(group["betas"][0]) * (1 - c))


def _step_of(reading: Reading) -> int:
    """The step under way, from 1 on: `k` counts those before it, and so does pytorch_optimizer's `step`."""
    return int(reading.group.get("k", reading.group.get("step", 0))) + 1


def _po_schedule_free_averages(reading: Reading) -> Averages:
    """Of √(v̂ + 1e-15) + ε."""
    found = corrected(_step_of)(reading)
    return replace(found, eps=found.eps + sqrt(1e-15))


_SCHEDULE_FREE = Adapter(
    f"gradient; the optimizer keeps no first moment; {NOT_ORTHOGONAL}",
    second_moment=second_moment("exp_avg_sq"),
    averages=corrected(_step_of),
    learning_rate=_schedule_free_rate,
    decoupled_decay=_schedule_free_decay,
)

_sophia_g = Adapter(
    _MOMENT,
    momentum=entry("exp_avg"),
    second_moment=second_moment("hessian", "hessian"),
    averages=uncorrected,
    clipped=_sophia_clipped,
    decoupled_decay=_DECAY,
)

ROWS: dict[str, Row] = {
    "lion_pytorch.lion_pytorch.Lion": Adapter(
        f"{_MOMENT}; the sign is taken of another average of it and the gradient", momentum=entry("exp_avg"), decoupled_decay=_lion_decay
    ),
    "sophia_opt.SophiaG": _sophia_g,
    "sophia.SophiaG": _sophia_g,  # the authors' file, which a script imports from beside it
    "adam_mini.adam_mini.Adam_mini": Adapter(
        f"first moment m after the step; {NOT_ORTHOGONAL}",
        momentum=_mini_momentum,
        second_moment=_mini_second_moment,
        averages=corrected(),
        decoupled_decay=_DECAY,
        intended=_mini_update,
    ),
    "galore_torch.adamw.AdamW": _galore,
    "prodigyopt.prodigy.Prodigy": _prodigy(
        _prodigy_rate,
        _prodigy_decay,
        _prodigy_averages("use_bias_correction", lambda reading: int(reading.group["k"]) + 1, decay_in_gradient=True),
    ),
    "pytorch_optimizer.optimizer.prodigy.Prodigy": _prodigy(
        _po_prodigy_rate,
        _po_prodigy_decay,
        _prodigy_averages("bias_correction", lambda reading: int(reading.group["step"]), decay_in_gradient=False),
    ),
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": _SCHEDULE_FREE,
    "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeAdamW": replace(_SCHEDULE_FREE, averages=_po_schedule_free_averages),
}
