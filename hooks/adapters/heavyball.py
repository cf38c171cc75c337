"""Rows for heavyball's Muon and SOAP.

The library keeps state[p][i] for every view i of a parameter, which it may reshape or split; its keys are the names of a
function, of a tensor and the place in the chain of transformations: `nesterov_ema_momentum_2`. After its step p.grad is None.
"""

from collections.abc import Mapping, Sequence
from math import nan, sqrt
from typing import Any

import torch
from torch import Tensor

from ...diagnostics.newton_schulz.families import FAMILIES
from ...diagnostics.quantities.problem import NewtonSchulz
from .adapter import Adapter, Averages, Orthogonalisation, Reading, SecondMoment, number
from .kronecker import Kronecker, kept_sides
from .table import Row


def _found(reading: Reading, *names: str) -> Any:
    """What the state holds under one of the names, with whatever number after it; None where the parameter was split."""
    views = [view for view in reading.state.values() if isinstance(view, Mapping)]
    if len(views) != 1:
        return None
    return next((value for key, value in views[0].items() if key.rpartition("_")[0] in names), None)


def _learning_rate(reading: Reading) -> float:
    """η·t/max(t, warm-up + 1), which is in the group only while it steps."""
    group = reading.group
    step = number(group.get("step_count", 0)) + 1
    return number(group["lr"]) * step / max(step, number(group["warmup_steps"]) + 1)


def _decay(reading: Reading) -> float:
    group = reading.group
    return nan if group["weight_decay"] and group["cautious_weight_decay"] else number(group["weight_decay"])


# Where the first transformation keeps its momentum.
_MOMENTA = {
    "nesterov_ema": "nesterov_ema_momentum",
    "nesterov_momentum": "nesterov_momentum_momentum",
    "heavyball_momentum": "heavyball_momentum_momentum",
    "exp_avg": "exp_avg_exp_avg",
}


def _momentum(reading: Reading) -> Tensor | None:
    momentum: Tensor | None = _found(reading, *_MOMENTA.values())
    return momentum


def _ns_input(reading: Reading) -> Tensor | None:
    """g + M for an average M, g + βM for a sum, M without Nesterov mixing.

    None where the iteration gets something else: a transformation stands before the momentum (clipping, MARS), or numbers are
    rounded at random on the way (bfloat16).
    """
    kind = getattr(reading.optimizer.fns[0], "fn_name", "")
    momentum, gradient = _momentum(reading), reading.gradient
    if kind not in _MOMENTA or momentum is None or gradient is None or torch.bfloat16 in (momentum.dtype, gradient.dtype):
        return None
    match kind:
        case "nesterov_ema":
            return gradient + momentum
        case "nesterov_momentum":
            return gradient.add(momentum * reading.group["betas"][0])
        case _:
            return momentum


def _settings(reading: Reading) -> NewtonSchulz | None:
    """None where the library's global setting has a square matrix orthogonalised in another way."""
    from heavyball import utils

    rows, cols = reading.weight.shape[0], reading.weight[0].numel()
    return NewtonSchulz(FAMILIES["you"].coefficients, 1e-7) if rows != cols or utils.zeroth_power_mode == "newtonschulz" else None


def _output_scale(reading: Reading, rows: int, cols: int) -> float:
    """NaN where a transformation or a cautious mask follows."""
    last = getattr(reading.optimizer.fns[-1], "fn_name", "")
    return nan if reading.group["caution"] or last != "orthogonalize_update" else sqrt(max(1, rows / cols))


def _turned_back(moment: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Q_L·m·Q_Rᵀ; an axis without a basis is not turned."""
    for basis in bases:
        # Contracting the first axis puts the new one last: after all of them, each is back in its place.
        moment = moment.movedim(0, -1) if basis is None else torch.tensordot(moment, basis[0], dims=([0], [1]))
    return moment


def _soap_momentum(reading: Reading) -> Tensor | None:
    moment, bases = _found(reading, "scale_by_soap_exp_avg"), _found(reading, "scale_by_soap_Q")
    if moment is None or len(bases or ()) != moment.ndim - 1:
        return None
    return _turned_back(moment[0], bases).reshape(reading.weight.shape)


def _soap_second_moment(reading: Reading) -> SecondMoment | None:
    values, moment = _found(reading, "scale_by_soap_exp_avg_sq"), _found(reading, "scale_by_soap_exp_avg")
    if values is None:
        return None
    shape = reading.weight.shape
    return SecondMoment(values[0].reshape(shape), "rotated", None if moment is None else moment[0].reshape(shape))


def _soap_averages(reading: Reading) -> Averages:
    """Both averages' decays are such that their weights add up to 1 at every step; √v is bounded by ε."""
    return Averages(1.0, 1.0, number(reading.group["eps"]))


def _soap_factors(reading: Reading) -> Kronecker | None:
    """Of each axis, after an axis of length 1."""
    kept = [_found(reading, f"scale_by_soap_{name}") for name in ("GG", "Q")]
    factors, bases = ([one[0] if isinstance(one, Tensor) else None for one in sides or ()] for sides in kept)
    return kept_sides(factors, bases)


def _soap_decay(reading: Reading) -> float:
    """None in a parameter's first step, which makes its basis and leaves the weights alone."""
    return _decay(reading) if reading.before else 0.0


ROWS: dict[str, Row] = {
    "heavyball.Muon": Adapter(
        "exact NS input: momentum after Nesterov mixing, before it is rounded to bfloat16 at random",
        momentum=_momentum,
        learning_rate=_learning_rate,
        decoupled_decay=_decay,
        orthogonalisation=Orthogonalisation(_ns_input, _settings, _output_scale),
    ),
    "heavyball.SOAP": Adapter(
        "first moment exp_avg after the step, turned back from the optimizer's basis; the optimizer does not orthogonalise",
        momentum=_soap_momentum,
        second_moment=_soap_second_moment,
        averages=_soap_averages,
        kronecker=_soap_factors,
        learning_rate=_learning_rate,
        decoupled_decay=_soap_decay,
        before=lambda reading: _found(reading, "scale_by_soap_Q") is not None,
    ),
}
