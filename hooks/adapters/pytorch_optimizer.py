"""Rows for the optimizers of pytorch_optimizer that work on every coordinate, or block of them, by itself.

The library counts steps per group, and adds coupled decay to the gradient in place. Its wrappers (Lookahead, SAM) have no row:
what they wrap is read.
"""

from collections.abc import Callable
from dataclasses import replace
from math import nan, sqrt

from torch import Tensor

from ...diagnostics.newton_schulz.families import JORDAN, repeat_last
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
from .table import Row
from .variance_reduced import corrected_gradient

_MOMENT = f"first moment exp_avg after the step; {NOT_ORTHOGONAL}"


def decay_of(reading: Reading) -> float:
    """λ where `weight_decouple` is set, else 0; under `fixed_decay` W loses the share λ itself, which is η·(λ/η)."""
    group = reading.group
    decay = number(group.get("weight_decay", 0.0))
    if not decay or not group.get("weight_decouple"):
        return 0.0
    return decay / (number(group["lr"]) or nan) if group.get("fixed_decay") else decay


def debias_factors(reading: Reading) -> tuple[float, float]:
    """1 − β₁ᵗ and 1 − β₂ᵗ; the group's step count was copied before the step."""
    step = int(reading.group.get("step", 0)) + 1
    beta1, beta2 = (number(beta) for beta in reading.group["betas"][:2])
    return 1 - beta1**step, 1 - beta2**step


def _step(reading: Reading) -> float:
    """t: the group's count was copied before the step."""
    return number(reading.group.get("step", 0)) + 1


def averages(*, as_a_whole: bool = False, under_root: float = 0.0, decay_in_gradient: bool = True) -> Callable[[Reading], Averages]:
    """A reader for m̂/(√(v̂ + δ) + ε), or m/(√(v + δ) + ε) corrected after (`as_a_whole`), δ being `under_root`.

    Rectification (RAdam's) brings the second; under `adam_debias` the first moment is not corrected.
    """

    def read(reading: Reading) -> Averages:
        whole = as_a_whole or bool(reading.group.get("rectify"))
        found = corrected(_step, as_a_whole=whole)(reading)
        root = sqrt(under_root / found.second) if whole and found.second > 0 else sqrt(under_root)
        first = 1.0 if reading.group.get("adam_debias") else found.first
        return replace(found, first=first, eps=found.eps + root, decay_in_gradient=decay_in_gradient)

    return read


BOUND = 1e-15  # that the library adds to v in the optimizers that can take AMSGrad's maximum


def _lamb_averages(reading: Reading) -> Averages:
    """m̂/(√v + ε): v is not corrected, and decay that is not decoupled is added to the update."""
    found = averages(decay_in_gradient=False)(reading)
    return found if reading.group.get("rectify") else replace(found, second=1.0)


def _largest_or(largest: str, key: str) -> Callable[[Reading], SecondMoment | None]:
    """What the update divides by: v, or under `ams_bound` its running maximum."""

    def read(reading: Reading) -> SecondMoment | None:
        values = entry(largest, key)(reading)
        return None if values is None else SecondMoment(values, "full")

    return read


def _adam_update(moment_of: Callable[[Reading], SecondMoment | None]) -> Callable[[Reading], Tensor | None]:
    """A reader of m̂/(√v̂ + ε), in float32; not under RAdam's rectification."""

    def read(reading: Reading) -> Tensor | None:
        moment, v = reading.state.get("exp_avg"), moment_of(reading)
        if moment is None or v is None or reading.group.get("rectify"):
            return None
        first, second = debias_factors(reading)
        return adam_update(moment, v.values, first, second, reading.group["eps"])

    return read


def _lamb_update(reading: Reading) -> Tensor | None:
    """The trust ratio, which the state holds, times m/(√v + ε), corrected as the library does: by 1 − β₁ᵗ alone, after the ratio.

    Not read where decay is coupled: it is added before the ratio.
    """
    state, group = reading.state, reading.group
    if "trust_ratio" not in state or group.get("rectify") or (group["weight_decay"] and not group["weight_decouple"]):
        return None
    ratio = 1.0 if group["adam"] else float(state["trust_ratio"])
    correction = 1.0 if group.get("adam_debias") else debias_factors(reading)[0]
    update: Tensor = state["exp_avg"].float() / (state["exp_avg_sq"].float().sqrt() + float(group["eps"]))
    return update * (ratio / correction)


def _sophia_clipped(reading: Reading) -> Tensor | None:
    """m/max(h, ε)/p in float32, before the clip at 1: p is this library's 1/γ, with which steps are multiplied."""
    state, group = reading.state, reading.group
    if "momentum" not in state:
        return None
    ratio: Tensor = state["momentum"].float() / state["hessian_moment"].float().clamp(min=group["eps"])
    return ratio / float(group["p"])


def _sophia_update(reading: Reading) -> Tensor | None:
    """clip(m/max(h, ε), p), in float32."""
    ratio = _sophia_clipped(reading)
    return None if ratio is None else ratio.clamp(-1, 1) * float(reading.group["p"])


def _lamb_ratio(reading: Reading) -> float:
    """The state's, which under `adam` is computed and not applied; not under RAdam's rectification, which may step without it."""
    group, ratio = reading.group, reading.state.get("trust_ratio")
    if ratio is None or group.get("rectify"):
        return nan
    return 1.0 if group["adam"] else float(ratio)


def _lars_ratio(reading: Reading) -> float:
    """trust·‖w‖/(‖g‖ + λ‖w‖), 1 where one is zero; before the step."""
    if reading.gradient is None:
        return nan
    weight, gradient, group = float(reading.weight.norm()), float(reading.gradient.norm()), reading.group
    denominator = gradient + number(group["weight_decay"]) * weight
    return number(group["trust_coefficient"]) * weight / denominator if weight > 0 and denominator > 0 else 1.0


def _lars_update(reading: Reading) -> Tensor | None:
    """The buffer, which sums gradients that the trust ratio has scaled already."""
    return None if reading.group["nesterov"] else entry("momentum_buffer")(reading)


def _mini_momentum(reading: Reading) -> Tensor | None:
    """m, kept by head where the second moment is."""
    moment: Tensor | None = reading.state.get("m")
    return None if moment is None else moment.reshape(reading.weight.shape)


def _mini_second_moment(reading: Reading) -> SecondMoment | None:
    """v of every coordinate in embeddings and heads; else v_mean: of every attention head of q and k, or of the whole matrix."""
    if "v" in reading.state:
        return SecondMoment(reading.state["v"], "full")
    values = reading.state.get("v_mean")
    return None if values is None else SecondMoment(values, "block" if values.ndim else "scalar")


def _mini_update(reading: Reading) -> Tensor | None:
    """m̂/(√v̂ + ε) in float32, v̂ the same all over a block."""
    moment, v = reading.state.get("m"), _mini_second_moment(reading)
    if moment is None or v is None:
        return None
    first, second = debias_factors(reading)
    of_all = v.values.unsqueeze(-1) if v.form == "block" else v.values
    update: Tensor = moment / first / ((of_all / second).sqrt() + float(reading.group["eps"]))
    return update.reshape(reading.weight.shape)


def _mars_corrected(reading: Reading) -> Tensor | None:
    beta = number(reading.group["betas"][0])
    maximize = getattr(reading.optimizer, "maximize", False)
    return corrected_gradient(reading, reading.group["gamma"] * beta / (1 - beta), maximize=maximize)


def _mars(group: Group) -> Adapter:
    """MARS on top of AdamW, Lion or Muon (which it calls Shampoo): only the first divides by a second moment."""
    moment = "average exp_avg of corrected and clipped gradients c_t after the step"
    if group["mars_type"] != "shampoo":
        adamw = group["mars_type"] == "adamw"
        return Adapter(
            f"{moment}; {NOT_ORTHOGONAL}",
            momentum=entry("exp_avg"),
            second_moment=_largest_or("max_exp_avg_sq", "exp_avg_sq") if adamw else lambda reading: None,
            averages=averages(as_a_whole=True, under_root=BOUND, decay_in_gradient=False),
            decoupled_decay=decay_of,
            before=_mars_corrected,
            correction=lambda reading: reading.before,
        )

    def ns_input(reading: Reading) -> Tensor | None:
        average: Tensor | None = reading.state.get("exp_avg")
        if average is None or group["cautious"]:
            return None  # cautious: masked by the gradient's signs first
        scaled: Tensor = average * (1.0 / (1.0 - group["betas"][0]))  # in this order, to be the library's to the bit
        return scaled.view(len(average), -1)

    return Adapter(
        f"exact NS input: {moment}, over 1 − β₁",
        momentum=entry("exp_avg"),
        decoupled_decay=decay_of,
        orthogonalisation=Orthogonalisation(
            ns_input,
            lambda reading: NewtonSchulz(repeat_last((JORDAN,), 5), float(group["eps"])),
            lambda reading, rows, cols: sqrt(max(1, reading.weight.shape[0] / reading.weight.shape[1])),
        ),
        before=_mars_corrected,
        correction=lambda reading: reading.before,
    )


_EXP_AVG_SQ = _largest_or("max_exp_avg_sq", "exp_avg_sq")
_BELIEF = _largest_or("max_exp_avg_var", "exp_avg_var")  # of g − m, with ε added at every step

_ROWS: dict[str, Row] = {
    "yogi.Yogi": Adapter(
        _MOMENT,
        momentum=entry("exp_avg"),
        second_moment=_EXP_AVG_SQ,
        averages=averages(),
        decoupled_decay=decay_of,
        intended=_adam_update(_EXP_AVG_SQ),
    ),
    "adabelief.AdaBelief": Adapter(
        _MOMENT,
        momentum=entry("exp_avg"),
        second_moment=_BELIEF,
        averages=averages(),
        decoupled_decay=decay_of,
        intended=_adam_update(_BELIEF),
    ),
    "adabound.AdaBound": Adapter(
        _MOMENT,
        momentum=entry("exp_avg"),
        second_moment=_EXP_AVG_SQ,
        averages=averages(as_a_whole=True, under_root=BOUND),
        decoupled_decay=decay_of,
    ),
    "lamb.Lamb": Adapter(
        f"{_MOMENT.removesuffix(NOT_ORTHOGONAL)}without the trust ratio; {NOT_ORTHOGONAL}",
        momentum=entry("exp_avg"),
        second_moment=second_moment("exp_avg_sq"),
        averages=_lamb_averages,
        decoupled_decay=decay_of,
        intended=_lamb_update,
        trust_ratio=_lamb_ratio,
    ),
    "lars.LARS": Adapter(
        f"momentum_buffer after the step, of gradients scaled by the trust ratio, the gradient where there is none; {NOT_ORTHOGONAL}",
        momentum=entry("momentum_buffer"),
        intended=_lars_update,
        before=_lars_ratio,
        trust_ratio=lambda reading: number(reading.before),
    ),
    "lion.Lion": Adapter(
        f"{_MOMENT}; the sign is taken of another average of it and the gradient", momentum=entry("exp_avg"), decoupled_decay=decay_of
    ),
    "novograd.NovoGrad": Adapter(
        f"momentum moments after the step, of gradients divided by their norm; {NOT_ORTHOGONAL}",
        momentum=entry("moments"),
        second_moment=second_moment("grads_ema", "scalar"),  # of ‖g‖², summed and not averaged over coordinates
        averages=lambda reading: replace(uncorrected(reading), first=nan, decay_in_gradient=False),  # decay is added after the division
        decoupled_decay=decay_of,
    ),
    "sophia.SophiaH": Adapter(
        f"first moment momentum after the step; {NOT_ORTHOGONAL}",
        momentum=entry("momentum"),
        second_moment=second_moment("hessian_moment", "hessian"),
        averages=uncorrected,
        clipped=_sophia_clipped,
        decoupled_decay=decay_of,
        intended=_sophia_update,
    ),
    "mars.MARS": _mars,
    "adam_mini.AdamMini": Adapter(
        f"first moment m after the step; {NOT_ORTHOGONAL}",
        momentum=_mini_momentum,
        second_moment=_mini_second_moment,
        averages=averages(),
        intended=_mini_update,
        decoupled_decay=group_setting("weight_decay"),
    ),
}
ROWS: dict[str, Row] = {f"pytorch_optimizer.optimizer.{name}": row for name, row in _ROWS.items()}
