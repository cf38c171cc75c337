"""What one parameter's update was made of, as a watched step shows it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose, log10, nan

import torch
from torch import Tensor

from ...diagnostics.newton_schulz.families import Coefficients
from ...diagnostics.quantities.problem import NewtonSchulz
from .matching import Factor, Match, Part
from .watched_step import WatchedStep

_NORMALISED = 6e-3  # distance of ‖X₀‖_F from 1 that rounding to bfloat16 makes
_UNDER_EPS = 0.5  # norms of X₀ under this are those of an input that its eps is larger than
_START_STEP = log10(1.01) / 2  # of ‖X₀‖_F, so that records of one rule have one list of coefficients
_SAME_SCALE = 0.02  # relative distance of the scales of two slices that are one


@dataclass(frozen=True)
class Iterated:
    """One parameter.

    Attributes:
        part: how it is cut for the iteration; what is no "whole" or "slice" has no input of the parameter's shape.
        parts: how many matrices that are.
        coefficients: a triple per step, as the step applies them.
        newton_schulz: the same, from the input divided by its Frobenius norm.
        dtype: format of the iteration.
        ns_input: exact, of the parameter's shape; None where it is in blocks, or was not found.
        before_normalising: whether `ns_input` is what was normalised, not X₀ itself.
        factor: what follows the iteration.
        scale: s of W − W′ = s·O + β·W; NaN where more than a factor follows.
        per_lr: s per learning rate.
        decay: β.
        cautious: whether β is of those entries of W alone that have the update's sign.
        unexplained: the most that a step leaves unexplained of an iterate, relative.
    """

    part: Part
    parts: int
    coefficients: Coefficients
    newton_schulz: NewtonSchulz
    dtype: torch.dtype
    ns_input: Tensor | None
    before_normalising: bool
    factor: Factor
    scale: float
    per_lr: float
    decay: float
    cautious: bool
    unexplained: float


def iterated(seen: WatchedStep, parameters: Sequence[Tensor], lr: float) -> dict[int, Iterated]:
    """What was found of the parameters, by their `id`; of those that no iteration moves, nothing."""
    of_parameter: dict[int, list[int]] = defaultdict(list)
    for i, found in enumerate(seen.matches):
        of_parameter[found.piece.parameter].append(i)
    return {id(p): _of_one(seen, of_parameter[id(p)], p, lr) for p in parameters if id(p) in of_parameter}


def _of_one(seen: WatchedStep, indices: Sequence[int], parameter: Tensor, lr: float) -> Iterated:
    indices = sorted(indices, key=lambda i: seen.matches[i].piece.index)
    matches = [seen.matches[i] for i in indices]
    first = matches[0]
    factor: Factor = "scale" if all(m.factor == "scale" for m in matches) else next(m.factor for m in matches if m.factor != "scale")
    scales = [m.scale for m in matches]
    one_scale = factor == "scale" and all(isclose(scale, scales[0], rel_tol=_SAME_SCALE) for scale in scales)
    scale = sum(scales) / len(scales) if one_scale else nan
    ns_input = _input(seen, indices, parameter)
    before_normalising = all(given is not None and given.exact for given in (seen.given[i] for i in indices))
    start = float(first.chain.start_norms[first.row])
    coefficients = tuple(first.chain.triples)
    return Iterated(
        part=first.piece.part,
        parts=len(matches),
        coefficients=coefficients,
        newton_schulz=_newton_schulz(coefficients, start, ns_input, first.piece.part == "slice"),
        dtype=first.chain.dtype,
        ns_input=ns_input,
        before_normalising=before_normalising,
        factor=factor,
        scale=scale,
        per_lr=scale / lr if lr else nan,
        decay=sum(m.decay for m in matches) / len(matches),
        cautious=any(m.cautious for m in matches),
        unexplained=max(m.chain.unexplained for m in matches),
    )


def _input(seen: WatchedStep, indices: Sequence[int], parameter: Tensor) -> Tensor | None:
    """In the parameter's shape, where the iterated matrices are the whole of it."""
    inputs = [seen.input_of(i) for i in indices]
    first: Match = seen.matches[indices[0]]
    count = 1 if first.piece.part == "whole" else parameter.shape[:-2].numel()
    if first.piece.part not in ("whole", "slice") or len(inputs) != count or any(one is None for one in inputs):
        return None
    return torch.stack([one for one in inputs if one is not None]).reshape(parameter.shape)


def _newton_schulz(coefficients: Coefficients, start: float, ns_input: Tensor | None, first_slice: bool) -> NewtonSchulz:
    """The iteration from the input on, or from its first slice, ‖X₀‖_F being `start`.

    A norm far under 1 is that of an input under the eps it was divided by; another one than 1 is a margin, for the spectral norm.
    """
    if start < _UNDER_EPS and ns_input is not None:
        norm = float((ns_input[0] if first_slice else ns_input).float().norm())
        return NewtonSchulz(coefficients, float(f"{norm / start:.2g}"))
    return NewtonSchulz(_from_norm(coefficients, start), 0.0)


def _from_norm(coefficients: Coefficients, start: float) -> Coefficients:
    """The triples from an X₀ of norm 1, where that of the optimizer has norm `start`: p(f·x) in the place of the first p(x)."""
    if not coefficients or abs(start - 1) <= _NORMALISED:
        return coefficients
    start = 10 ** (round(log10(start) / _START_STEP) * _START_STEP)
    a, b, c = coefficients[0]
    return ((a * start, b * start**3, c * start**5), *coefficients[1:])
