"""Rows for optimizers that are published as a repository and not as a package for the Python in use.

They were written from the repositories' public source and tested on stand-ins with the same state, not on the libraries. What a newer
version has renamed reads as missing; nothing is guessed.
"""

from collections.abc import Mapping
from math import isqrt, nan, sqrt
from typing import Any

import torch
from torch import Tensor

from ...diagnostics.newton_schulz.families import JORDAN, repeat_last
from ...diagnostics.quantities.problem import NewtonSchulz
from . import dion, emerging_optimizers
from .adapter import (
    NOT_ORTHOGONAL,
    Adapter,
    Averages,
    Orthogonalisation,
    Reading,
    SecondMoment,
    corrected,
    entry,
    group_setting,
    number,
    second_moment,
    uncorrected,
)
from .kronecker import Kronecker, implied_second_moment, kept_sides
from .table import Row
from .variance_reduced import corrected_gradient

_DECAY = group_setting("weight_decay")


# facebookresearch/optimizers: Distributed Shampoo. A parameter is cut into blocks; state[p]["block_0"], ["block_1"], …
# Where several ranks share a parameter, the blocks are named otherwise or are not all there, and nothing is read.


def _blocks(reading: Reading) -> list[Mapping[str, Any]]:
    state = reading.state
    return [state[f"block_{k}"] for k in range(len(state)) if isinstance(state.get(f"block_{k}"), Mapping)]


def _assembled(pieces: list[Tensor], like: Tensor) -> Tensor | None:
    """A parameter from its blocks, which come row by row; None where that does not come out even."""
    if len(pieces) == 1 and pieces[0].numel() == like.numel():
        return pieces[0].reshape(like.shape)
    if like.ndim != 2 or any(piece.ndim != 2 for piece in pieces):
        return None
    rows: list[Tensor] = []
    line: list[Tensor] = []
    for piece in pieces:
        line.append(piece)
        if sum(part.shape[1] for part in line) >= like.shape[1]:
            rows.append(torch.cat(line, dim=1))
            line = []
    whole = torch.cat(rows) if rows and not line else None
    return whole if whole is not None and whole.shape == like.shape else None


def _shampoo_momentum(reading: Reading) -> Tensor | None:
    # An older version wraps it in an object of its own.
    filtered = [block.get("filtered_grad") for block in _blocks(reading)]
    return _assembled([part for part in filtered if isinstance(part, Tensor)], reading.weight)


def packed_diagonal(factor: Tensor) -> Tensor:
    """The diagonal of a symmetric matrix that is kept as its upper triangle, row after row; of one that is kept whole, too."""
    if factor.ndim == 2:
        return factor.diagonal()
    size = (isqrt(8 * factor.numel() + 1) - 1) // 2
    row = torch.arange(size, device=factor.device)
    return factor[row * size - row * (row - 1) // 2]


def _shampoo_second_moment(reading: Reading) -> SecondMoment | None:
    """The second moment that each block's factors imply.

    All factors of a block have the trace E‖G‖²_F. Where the diagonals that were read do not, they are of another method (KL-Shampoo)
    or packed in another order, and nothing is read; nor where an axis has no factor.
    """
    pieces = []
    for block in _blocks(reading):
        factors = getattr(block.get("shampoo"), "factor_matrices", ())
        if not factors or not all(isinstance(factor, Tensor) for factor in factors):
            return None
        diagonals = [packed_diagonal(factor) for factor in factors]
        traces = torch.stack([diagonal.sum() for diagonal in diagonals])
        if not torch.allclose(traces, traces[0], rtol=1e-3):
            return None
        pieces.append(implied_second_moment(diagonals))
    values = _assembled(pieces, reading.weight)
    return None if values is None else SecondMoment(values, "preconditioner")


def _unpacked(factor: Tensor) -> Tensor:
    """A symmetric matrix whose upper triangle is kept, row after row; one that is kept whole is given as it is."""
    if factor.ndim == 2:
        return factor
    size = (isqrt(8 * factor.numel() + 1) - 1) // 2
    upper = torch.zeros(size, size, dtype=factor.dtype, device=factor.device)
    upper[tuple(torch.triu_indices(size, size, device=factor.device))] = factor
    return upper + upper.triu(1).mT


def _shampoo_factors(reading: Reading) -> Kronecker | None:
    """Those of a matrix that is one block, checked as above. The exponent can be overridden in ways that are not read."""
    blocks = _blocks(reading)
    if len(blocks) != 1 or reading.weight.ndim != 2 or _shampoo_second_moment(reading) is None:
        return None
    factors = tuple(blocks[0]["shampoo"].factor_matrices)
    return kept_sides([_unpacked(factor) for factor in factors])


def _shampoo_decay(reading: Reading) -> float:
    """λ in W(1 − ηλ): by `weight_decay_type` (an enum), in older versions by `use_decoupled_weight_decay`.

    Missing where averaging of the iterates follows, which takes only a part of the step.
    """
    group, decay = reading.group, _DECAY(reading)
    if not decay:
        return 0.0
    if group.get("iterate_averaging_config") is not None:
        return nan
    decoupled = group.get("use_decoupled_weight_decay")
    match getattr(group.get("weight_decay_type"), "name", None):
        case None if decoupled is not None:
            return decay if decoupled else 0.0
        case "L2":
            return 0.0
        case "DECOUPLED":
            return decay
        case "CORRECTED":
            return decay * number(group["lr"]) / number(group["peak_lr"])
        case "INDEPENDENT":
            return decay / number(group["peak_lr"])
        case _:
            return nan


_SHAMPOO = Adapter(
    f"filtered_grad, the blocks put together, after the step and before it is preconditioned; {NOT_ORTHOGONAL}",
    momentum=_shampoo_momentum,
    second_moment=_shampoo_second_moment,
    kronecker=_shampoo_factors,
    decoupled_decay=_shampoo_decay,
)


# nikhilvyas/SOAP, as it is now: both moments live in the eigenbasis of Shampoo's factors. An early version averaged gradients before
# it turned them; its exp_avg would be turned back once too often.


def _soap_momentum(reading: Reading) -> Tensor | None:
    """Q_L·m·Q_Rᵀ; an axis without a basis (an empty entry of Q) is not turned."""
    momentum: Tensor | None = reading.state.get("exp_avg")
    if momentum is None or momentum.ndim != len(reading.state.get("Q") or ()):
        return None
    for basis in reading.state["Q"]:
        # Contracting the first axis puts the new one last: after all of them, each is back in its place.
        momentum = torch.tensordot(momentum, basis, dims=([0], [1])) if len(basis) else momentum.movedim(0, -1)
    return momentum


def _soap_second_moment(reading: Reading) -> SecondMoment | None:
    values, moment = reading.state.get("exp_avg_sq"), reading.state.get("exp_avg")
    return None if values is None else SecondMoment(values, "rotated", moment)


def _soap_averages(reading: Reading) -> Averages:
    """Corrected as a whole, where the group asks for it; where it does not say so, that is not known."""
    match reading.group.get("correct_bias"):
        case None:
            return Averages()
        case False:
            return uncorrected(reading)
        case _:
            return corrected(as_a_whole=True)(reading)


def _soap_decay(reading: Reading) -> float:
    """None in the first step, which is skipped. Later it acts on W as the update left it: a relative difference of ηλ in the update."""
    return _DECAY(reading) if reading.state.get("step") else 0.0


# AGI-Arena/MARS: MARS-M, imported from its own folder. One group holds matrices and what AdamW updates; the state says which is which.


def _mars_m_ns_input(reading: Reading) -> Tensor | None:
    # More dimensions are orthogonalised slice by slice, but scaled by the norm of all.
    return reading.state.get("momentum_buffer") if reading.weight.ndim == 2 else None


def _mars_m_settings(reading: Reading) -> NewtonSchulz | None:
    return NewtonSchulz(repeat_last((JORDAN,), int(reading.group["ns_steps"])), 1e-7) if "momentum_buffer" in reading.state else None


def _mars_m_scale(reading: Reading, rows: int, cols: int) -> float:
    return 0.2 * sqrt(max(rows, cols)) if "momentum_buffer" in reading.state else nan


def _mars_m_corrected(reading: Reading) -> Tensor | None:
    """Missing where AdamW updates the parameter, with the plain gradient."""
    group, beta = reading.group, number(reading.group["momentum"])
    factor = group["mars_factor"] if "mars_factor" in group else group["gamma"] * beta / (1 - beta)
    return corrected_gradient(reading, number(factor)) if reading.state.get("use_muon") else None


_MARS_M = Adapter(
    "exact NS input: momentum_buffer, the average of corrected and clipped gradients c_t, after the step",
    momentum=entry("momentum_buffer", "moment1"),
    second_moment=second_moment("moment2"),
    decoupled_decay=group_setting("wd"),
    orthogonalisation=Orthogonalisation(_mars_m_ns_input, _mars_m_settings, _mars_m_scale),
    before=_mars_m_corrected,
    correction=lambda reading: reading.before,
)

ROWS: dict[str, Row] = {
    **dion.ROWS,
    **emerging_optimizers.ROWS,
    "distributed_shampoo.distributed_shampoo.DistributedShampoo": _SHAMPOO,
    "soap.SOAP": Adapter(
        f"first moment exp_avg after the step, turned back from the optimizer's basis; {NOT_ORTHOGONAL}",
        momentum=_soap_momentum,
        second_moment=_soap_second_moment,
        averages=_soap_averages,
        kronecker=lambda reading: kept_sides(reading.state.get("GG"), reading.state.get("Q")),
        decoupled_decay=_soap_decay,
    ),
    "optimizers.mars_m.MARS_M": _MARS_M,
}
