"""By which factors a step multiplies weights once their update is in them: QK-Clip of some heads, a norm that is kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .trace import storage_of, take

_ROUNDINGS = 4.0  # eps by which an entry may miss its factor: products round by half of it
_DISTINCT = 16.0  # eps that a factor is away from 1 at least: updates that are lost in the weights' rounding leave nothing else
_SAME_DECAY = 0.05  # relative distance of 1 − f from ηλ where f is the decay

Sampled: TypeAlias = tuple[Tensor, Tensor]  # all rows at some columns, and all columns at some rows; float64


@dataclass
class _Writes:
    """Into one parameter.

    Attributes:
        parameter: a copy's.
        storage: where its weights lay before the step.
        moved: whether something else than a factor has been written.
        told: whether what was written last, factors aside, was computed in place: what is copied in may hold factors already.
        factor: by which the weights have been multiplied since.
    """

    parameter: Tensor
    storage: int
    moved: bool = False
    told: bool = True
    factor: Tensor | None = None

    def sampled(self) -> Sampled:
        weights = self.parameter.detach()
        weights = weights.reshape(len(weights), -1)
        return take(weights, 1).double(), take(weights, 0).double()  # no views: of another format

    def see(self, before: Sampled, name: str) -> None:
        """What an operation of a name has written."""
        after = self.sampled()
        if all(map(torch.equal, before, after)):
            return
        factor = _factor(before, after, torch.finfo(self.parameter.dtype).eps, multiplies=name in ("mul", "div"))
        if factor is None:
            self.moved, self.told, self.factor = True, name != "copy", None
        elif self.moved:
            self.factor = factor if self.factor is None else self.factor * factor


class WeightWrites:
    """Follows what is written into parameters, by values: which operation writes, and into which view, does not matter."""

    def __init__(self, parameters: Mapping[int, Tensor]) -> None:
        """`parameters` are a copy's, by the `id` of what each is a copy of; those that are no floating-point matrices are not followed."""
        self._writes = {
            key: _Writes(p, storage_of(p)) for key, p in parameters.items() if p.ndim >= 2 and p.numel() and p.dtype.is_floating_point
        }

    def around(self, written: Sequence[Tensor]) -> Callable[[str], None]:
        """Before an operation writes into tensors: what is to be called after it, with its name."""
        storages = {storage_of(tensor) for tensor in written}
        kept = [(one, one.sampled()) for one in self._writes.values() if one.storage in storages]

        def after(name: str) -> None:
            for one, before in kept:
                one.see(before, name)

        return after

    def factors(self, group: Mapping[str, Any]) -> dict[int, Tensor]:
        """Of every parameter the factor that followed its update, broadcastable with it; 1 where none did. Those of which that is not known are left out.

        Weights that the step put elsewhere, or copied from what it had computed elsewhere, are not known. Weight decay is no such factor: one number
        for the matrix, 1 − ηλ by the `group`'s settings; without a setting one that all matrices share.
        """
        known = {key: one for key, one in self._writes.items() if one.moved and storage_of(one.parameter) == one.storage}
        whole = {key: _one_number(one.factor) for key, one in known.items()}
        lr, decay = group.get("lr"), group.get("weight_decay", group.get("wd"))
        if isinstance(decay, (int, float)) and isinstance(lr, (int, float)):
            decays = {key for key, f in whole.items() if f is not None and isclose(1 - f, lr * decay, rel_tol=_SAME_DECAY)}
        else:
            shared = next(iter(whole.values()), None)
            decays = (
                set(whole)
                if shared is not None and all(f is not None and isclose(f, shared, rel_tol=1e-6) for f in whole.values())
                else set()
            )
        return {
            key: torch.ones(()) if one.factor is None or key in decays else _shaped(one.factor, one.parameter)
            for key, one in known.items() if one.told or one.factor is not None
        }  # fmt: skip


def _shaped(factor: Tensor, parameter: Tensor) -> Tensor:
    """Of the rows, columns or entries of the matrix that a parameter is flattened to, as one of the parameter."""
    if factor.shape[1] == 1:
        return factor.reshape(-1, *[1] * (parameter.ndim - 1))
    return factor.reshape(-1, *parameter.shape[1:])


def _one_number(factor: Tensor | None) -> float | None:
    if factor is None:
        return None
    least, most = float(factor.min()), float(factor.max())
    return least if isclose(least, most, rel_tol=1e-6) else None


def _factor(before: Sampled, after: Sampled, eps: float, *, multiplies: bool) -> Tensor | None:
    """f of every row, shape (rows, 1), or of every column, (1, columns), where the weights were multiplied by that to rounding; else None.

    `multiplies`: the operation is a product, and a factor however near 1 is one.
    """
    for long, axis in ((0, 1), (1, 0)):  # the sample that has all rows tells factors of rows, the other one those of columns
        squares = before[long].square().sum(axis, keepdim=True)
        found = (before[long] * after[long]).sum(axis, keepdim=True) / squares
        found = torch.where(squares > 0, found, torch.ones_like(found))
        short = take(found, long)
        made = zip((before[long], before[1 - long]), (after[long], after[1 - long]), (found, short), strict=True)
        if all(_is_product(b, a, f, eps) for b, a, f in made):
            distinct = bool(((found - 1).abs() > _DISTINCT * eps).any())
            return found if multiplies or distinct else None
    return None


def _is_product(before: Tensor, after: Tensor, factor: Tensor, eps: float) -> bool:
    made = before * factor
    return bool(((after - made).abs() <= _ROUNDINGS * eps * made.abs()).all())
