"""Rows for the optimizers of pytorch_optimizer that work in a basis of their own: Shampoo, SOAP, GaLore, APOLLO."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from .adapter import NOT_ORTHOGONAL, Adapter, Averages, Group, Reading, SecondMoment, corrected, entry, group_setting, number, uncorrected
from .kronecker import Kronecker, implied_second_moment, kept_sides
from .pytorch_optimizer import averages, debias_factors, decay_of
from .table import Row

_DECAY = group_setting("weight_decay")


def _shampoo_second_moment(reading: Reading) -> SecondMoment | None:
    """What the factors imply, which sum up ε𝟙 and every step's contraction of the gradient with itself."""
    factors = [reading.state.get(f"pre_cond_{axis}") for axis in range(reading.weight.ndim)]
    diagonals = [factor.diagonal() for factor in factors if factor is not None]
    return SecondMoment(implied_second_moment(diagonals), "preconditioner") if len(diagonals) == len(factors) else None


def _shampoo_factors(reading: Reading) -> Kronecker | None:
    """A root of order twice the number of axes is taken of each."""
    return kept_sides([reading.state.get(f"pre_cond_{axis}") for axis in range(reading.weight.ndim)], exponent=-1 / 4)


def _scalable_second_moment(reading: Reading) -> SecondMoment | None:
    """What the factors of every block imply, put together; None where not every axis has one (small tensors are not preconditioned)."""
    preconditioner: Any = reading.state.get("pre_conditioner")
    statistics: Sequence[Tensor] = getattr(preconditioner, "statistics", ())
    if not len(statistics) or preconditioner.rank != len(preconditioner.transformed_shape):
        return None
    diagonals = [factor.diagonal() for factor in statistics]
    rank = preconditioner.rank
    blocks = [implied_second_moment(diagonals[i : i + rank]) for i in range(0, len(diagonals), rank)]
    merged: Tensor = preconditioner.partitioner.merge_partitions(blocks)
    return SecondMoment(merged.reshape(reading.weight.shape), "preconditioner")


def _scalable_decay(reading: Reading) -> float:
    return _DECAY(reading) if reading.group["decoupled_weight_decay"] else 0.0


def _soap_second_moment(reading: Reading) -> SecondMoment | None:
    """In the eigenbasis; the first moment, kept in the parameter's own basis, is turned into it."""
    values, moment, bases = reading.state.get("exp_avg_sq"), reading.state.get("exp_avg"), reading.state.get("Q")
    if values is None:
        return None
    if moment is None or bases is None or len(bases) != moment.ndim:
        return SecondMoment(values, "rotated")
    for basis in bases:
        # Contracting the first axis puts the new one last: after all of them, each is back in its place.
        moment = torch.tensordot(moment, basis, dims=([0], [0])) if len(basis) else moment.movedim(0, -1)
    return SecondMoment(values, "rotated", moment)


def _soap_averages(reading: Reading) -> Averages:
    """Counted without the first step, which is skipped."""
    if not reading.group["correct_bias"]:
        return uncorrected(reading)
    return corrected(lambda reading: number(reading.group.get("step", 0)), as_a_whole=True)(reading)


def lifted(moment: Tensor, projector: Any, shape: Sequence[int]) -> Tensor:
    """A moment from its low-rank projection, back in the parameter's shape, with the projector's present matrix.

    That matrix spans the right side of tall gradients and the left one of wide ones under "std" and "random", and the other
    side under "reverse_std". The library's `scale` is of updates and left out.
    """
    basis: Tensor | tuple[Tensor, Tensor] = projector.ortho_matrix
    if isinstance(basis, tuple):
        return basis[0] @ moment @ basis[1]
    tall = shape[0] >= shape[1]
    match projector.projection_type:
        case "std" | "random":
            on_the_right = tall
        case "reverse_std":
            on_the_right = not tall
        case kind:
            on_the_right = kind == "right"
    return moment @ basis if on_the_right else basis @ moment


def _low_rank_momentum(reading: Reading) -> Tensor | None:
    return _in_shape(reading, reading.state.get("exp_avg"))


def _in_shape(reading: Reading, tensor: Tensor | None) -> Tensor | None:
    projector = reading.state.get("projector")
    return tensor if projector is None or tensor is None else lifted(tensor, projector, reading.weight.shape)


def _low_rank_second_moment(reading: Reading) -> SecondMoment | None:
    values, projected = reading.state.get("exp_avg_sq"), "projector" in reading.state
    if values is None:
        return None
    return SecondMoment(values, "projected", reading.state.get("exp_avg")) if projected else SecondMoment(values, "full")


def _galore_update(reading: Reading) -> Tensor | None:
    """m̂/(√v̂ + ε/√(1 − β₂ᵗ)), lifted, times the projector's scale."""
    state = reading.state
    if "exp_avg" not in state:
        return None
    update = _in_shape(reading, state["exp_avg"] / (state["exp_avg_sq"].sqrt() + float(reading.group["eps"])))
    first, second = debias_factors(reading)
    return None if update is None else update.float() * (sqrt(second) / first * getattr(state.get("projector"), "scale", 1.0))


def _apollo_decay(reading: Reading) -> float:
    """Decay goes with the bias-corrected step size η·√(1 − β₂ᵗ)/(1 − β₁ᵗ), unless it is fixed."""
    decay, group = decay_of(reading), reading.group
    if not group["correct_bias"] or group["fixed_decay"]:
        return decay
    first, second = debias_factors(reading)
    return decay * sqrt(second) / first


def _apollo_averages(reading: Reading) -> Averages:
    return averages(as_a_whole=True)(reading) if reading.group["correct_bias"] else uncorrected(reading)


def _galore(group: Group) -> Adapter:
    where = "lifted from the gradient's low-rank subspace" if "rank" in group else "of every coordinate, as the group has no rank"
    return Adapter(
        f"first moment exp_avg after the step, {where}; {NOT_ORTHOGONAL}",
        momentum=_low_rank_momentum,
        second_moment=_low_rank_second_moment,
        averages=averages(as_a_whole=True),
        decoupled_decay=_DECAY,  # taken from W after the update: a relative difference of ηλ
        intended=_galore_update,
    )


def _apollo(group: Group) -> Adapter:
    where = (
        "lifted from a random projection: of its size, but no direction of the update"
        if "rank" in group
        else "of every coordinate, as the group has no rank"
    )
    return Adapter(
        f"first moment exp_avg after the step, {where}; {NOT_ORTHOGONAL}",
        momentum=_low_rank_momentum,
        second_moment=_low_rank_second_moment,
        averages=_apollo_averages,
        decoupled_decay=_apollo_decay,  # from W after the update, as GaLore's
    )


_ROWS: dict[str, Row] = {
    # momentum_buffer holds the last preconditioned update, which is mixed into the next gradient.
    "shampoo.Shampoo": Adapter(
        f"gradient; the optimizer keeps no average of gradients; {NOT_ORTHOGONAL}",
        second_moment=_shampoo_second_moment,
        kronecker=_shampoo_factors,
        decoupled_decay=decay_of,
    ),
    "shampoo.ScalableShampoo": Adapter(
        f"momentum after the step, of preconditioned gradients; {NOT_ORTHOGONAL}",
        momentum=entry("momentum"),
        second_moment=_scalable_second_moment,
        decoupled_decay=_scalable_decay,
    ),
    "soap.SOAP": Adapter(
        f"first moment exp_avg after the step, which is kept in the parameter's own basis; {NOT_ORTHOGONAL}",
        momentum=entry("exp_avg"),
        second_moment=_soap_second_moment,
        averages=_soap_averages,
        kronecker=lambda reading: kept_sides(reading.state.get("GG"), reading.state.get("Q")),
        decoupled_decay=_DECAY,  # taken from W after the update: a relative difference of ηλ
    ),
    "galore.GaLore": _galore,
    "apollo.APOLLO": _apollo,
}
ROWS: dict[str, Row] = {f"pytorch_optimizer.optimizer.{name}": row for name, row in _ROWS.items()}
