"""Rows for the reference optimizers in `examples/optimizers` that run no Newton–Schulz iteration."""

from dataclasses import replace
from importlib import import_module

import torch
from torch import Tensor

from .adapter import (
    NOT_ORTHOGONAL,
    Adapter,
    Averages,
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
from .kronecker import Kronecker, implied_second_moment
from .table import Row


def _caspr_second_moment(reading: Reading) -> SecondMoment | None:
    factors = [reading.state.get(key) for key in ("left", "right")]
    diagonals = [factor.diagonal() for factor in factors if isinstance(factor, Tensor)]
    return SecondMoment(implied_second_moment(diagonals), "preconditioner") if len(diagonals) == 2 else None


def _caspr_factors(reading: Reading) -> Kronecker | None:
    """No one exponent: three terms with different ones are added."""
    return Kronecker((reading.state["left"], reading.state["right"])) if "left" in reading.state else None


def _onebit_second_moment(reading: Reading) -> SecondMoment | None:
    """v: "full" while it is still averaged, "frozen" from the first step on that left it alone."""
    values = reading.state.get("exp_avg_sq")
    frozen = reading.state.get("step", 0) > reading.group["freeze_step"]
    return SecondMoment(values, "frozen" if frozen else "full") if isinstance(values, Tensor) else None


def _onebit_averages(reading: Reading) -> Averages:
    """v̂ is corrected as of the step at which v froze."""
    seen_by_v = corrected(lambda reading: min(reading.state["step"], reading.group["freeze_step"]))(reading)
    return replace(seen_by_v, first=corrected()(reading).first)


def _onebit_update(reading: Reading) -> Tensor | None:
    """m̂/(√v̂ + ε) in float32, v̂ corrected as of the step at which v froze."""
    state, group = reading.state, reading.group
    if "exp_avg" not in state:
        return None
    beta1, beta2 = (number(beta) for beta in group["betas"])
    seen_by_v = min(state["step"], group["freeze_step"])
    return adam_update(state["exp_avg"], state["exp_avg_sq"], 1 - beta1 ** state["step"], 1 - beta2**seen_by_v, group["eps"])


def _sophia_clipped(reading: Reading) -> Tensor | None:
    """m/max(γh, ε) in float32, before the clip at 1."""
    state, group = reading.state, reading.group
    if "exp_avg" not in state:
        return None
    ratio: Tensor = state["exp_avg"].float() / (group["gamma"] * state["hessian"].float()).clamp(min=group["eps"])
    return ratio


def _sophia_update(reading: Reading) -> Tensor | None:
    """clip(m/max(γh, ε), 1) in float32."""
    ratio = _sophia_clipped(reading)
    return None if ratio is None else ratio.clamp(-1, 1)


def _aro_rotation(reading: Reading) -> Tensor | None:
    """R before the step; the identity before the first."""
    size = min(reading.weight.shape)
    rotation: Tensor | None = reading.state.get("rotation")
    return torch.eye(size, dtype=reading.weight.dtype, device=reading.weight.device) if rotation is None else rotation.clone()


def _aro_rotated(reading: Reading) -> tuple[Tensor, ...] | None:
    """R before and after, M, f(M) and R f(RᵀM), f as the optimizer's module has it."""
    momentum, rotation = reading.state.get("momentum_buffer"), reading.state.get("rotation")
    if momentum is None or rotation is None or reading.before is None:
        return None
    base = import_module(type(reading.optimizer).__module__).BASES[reading.group["base"]]
    momentum = momentum if momentum.shape[0] <= momentum.shape[1] else momentum.mT
    return reading.before, rotation, momentum, base(momentum), rotation @ base(rotation.mT @ momentum)


_DECAY = group_setting("weight_decay")

ROWS: dict[str, Row] = {
    "optiscope.examples.optimizers.aro.ARO": Adapter(
        "momentum_buffer after the step, before it is rotated; no Newton–Schulz iteration follows",
        momentum=entry("momentum_buffer"),
        decoupled_decay=_DECAY,
        before=_aro_rotation,
        rotation=_aro_rotated,
    ),
    "optiscope.examples.optimizers.caspr.CASPR": Adapter(
        f"first moment exp_avg after the step, before it is preconditioned; {NOT_ORTHOGONAL}",
        momentum=entry("exp_avg"),
        second_moment=_caspr_second_moment,
        kronecker=_caspr_factors,
        decoupled_decay=_DECAY,
    ),
    "optiscope.examples.optimizers.onebit_adam.OneBitAdam": Adapter(
        f"first moment exp_avg after the step, compressed to its sign and one scale after the warm-up; {NOT_ORTHOGONAL}",
        momentum=entry("exp_avg"),
        second_moment=_onebit_second_moment,
        averages=_onebit_averages,
        decoupled_decay=_DECAY,
        intended=_onebit_update,
    ),
    "optiscope.examples.optimizers.sophia_g.SophiaG": Adapter(
        f"first moment exp_avg after the step; {NOT_ORTHOGONAL}",
        momentum=entry("exp_avg"),
        second_moment=second_moment("hessian", "hessian"),
        averages=uncorrected,
        clipped=_sophia_clipped,
        decoupled_decay=_DECAY,
        intended=_sophia_update,
    ),
}
