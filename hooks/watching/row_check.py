"""Whether a class in the adapter table does what its row says: one step, watched on a copy of one matrix, compared where it can be told for certain."""

import logging
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...diagnostics.newton_schulz.families import Coefficients
from ...diagnostics.newton_schulz.spectral_map import ns_map
from ..adapters import Adapter, Group, Reading, adapter_for, parameter_state
from ..guard import KeptOut
from .iterations import Chain
from .matching import Match
from .trace import sample
from .watched_step import WatchedStep, watch_step

log = logging.getLogger("optiscope")

_SIDES = 10, 1024  # of the matrix: a smaller one has too few singular values, of a larger one they are expensive
_DISTINCT, _APART = 8, 1.02  # singular values that are needed, and the ratio of two that differ
_COARSE = 1e-5  # eps of a format whose rounding is seen in an iterate
# By whether the iteration is coarse (bfloat16, float16): the smallest readable singular value, of ‖M‖_F; what a step, and the whole iteration run again in
# float64, may leave where steps were clearly told; and what polynomials differ by, of the larger, that are the same, and that are others: at most 0.0075 and 1.7e-5
# were seen in 12,192 iterations' steps of 34 right optimizers.
_READABLE = {True: 0.02, False: 1e-3}
_ROUNDING = {True: 0.02, False: 1e-4}
_REPEATED = {True: 0.1, False: 1e-3}
_SAME = {True: 0.02, False: 1e-4}
_OTHER = {True: 0.05, False: 1e-3}
_TIMES_LEFT = 4.0  # of what the fit leaves: less than that is no other polynomial
_NORMALISED = 0.5, 1.1  # ‖X₀‖_F beside that expected: a spectral norm's margin makes it less, nothing more but a step that was not seen
_SAME_INPUT, _OTHER_INPUT = 1e-5, 1e-3  # 1 − |cosine|: at most 1.8e-6 was seen, which two roundings to bfloat16 leave


class RowCheck:
    """Of one optimizer: one step, the first recorded one that may tell, is watched, and none after it.

    Attributes:
        differs: what the step did otherwise than the row says, in words; none where it did the same, None where that is not known.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._parameter: Tensor | None = None  # that was watched
        self.differs: list[str] | None = None

    def watch(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Watch the coming step of the smallest matrix that may tell; whether something is known now that was not."""
        with KeptOut(lambda error: log.debug("optiscope: a step of a copy could not be compared with its row: %s", error)):
            for group in self._optimizer.param_groups if self._parameter is None else ():
                adapter = adapter_for(self._optimizer, group)
                if adapter is None or adapter.orthogonalisation is None or adapter.stacks is not None:
                    continue
                tells = [p for p in group["params"] if _may_tell(p, parameter_state(self._optimizer, p))]
                if tells:
                    self._parameter = min(tells, key=Tensor.numel)
                    self.differs = compare(self._optimizer, group, adapter, self._parameter, args, kwargs)
                    return self.differs is not None
        return False

    def of(self, group: Group) -> list[str] | None:
        """What `differs` says of a group, None of another than that of the matrix that was watched."""
        return self.differs if any(p is self._parameter for p in group["params"]) else None


def _may_tell(parameter: Tensor, state: Mapping[Any, Any]) -> bool:
    """Whether there is a momentum already, which the gradient is not proportional to, and the matrix is of a size to be told."""
    small, large = _SIDES
    gradient = parameter.grad
    return (
        parameter.ndim == 2
        and small <= min(parameter.shape) <= large
        and bool(state)
        and gradient is not None
        and gradient.layout is torch.strided
        and bool(gradient.any())
    )


def compare(
    optimizer: Any, group: Group, adapter: Adapter, parameter: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[str] | None:
    """What the coming step of a matrix does otherwise than its adapter says, in words; none where it does the same, None where that cannot be told.

    Told are only a finite input of many distinct singular values, and steps that were found to rounding: on few values many lists of
    coefficients do the same.

    Raises:
        Exception: whatever keeps a copy from being made or stepped.
    """
    ns = adapter.orthogonalisation
    assert ns is not None
    before = Reading(optimizer, parameter, parameter.detach(), dict(group), parameter_state(optimizer, parameter), parameter.grad)
    early = None if adapter.before is None else adapter.before(before)
    seen = watch_step(optimizer, group, [parameter], args, kwargs)
    if len(seen.matches) != 1 or seen.matches[0].piece.part != "whole":
        return None
    reading = _after(seen, before, early)
    settings, expected, given = ns.settings(reading), ns.ns_input(reading), seen.input_of(0)
    if settings is None or not settings.coefficients or settings.scaling != "frobenius" or expected is None or given is None:
        return None
    expected = expected.reshape(given.shape)
    match, norm = seen.matches[0], float(given.double().norm())
    if not isfinite(norm) or not bool(expected.isfinite().all()) or not bool(expected.any()):
        return None
    coarse = torch.finfo(match.chain.dtype).eps > _COARSE
    x = _singular_values(given, norm)
    if _distinct(x[x > _READABLE[coarse]]) < _DISTINCT or not _clearly_told(match, given, norm, coarse):
        return None
    start = float(match.chain.start_norms[match.row])
    own_norm = float(expected.double().norm())
    expected_start = own_norm / max(own_norm, settings.eps)
    if not _NORMALISED[0] < start / expected_start < _NORMALISED[1]:
        return None
    steps = _compare_steps(match.chain, settings.coefficients, start * x, expected_start / start, coarse)
    unlike = 1 - abs(float((given.double() * expected.double()).sum())) / (norm * own_norm)
    if steps is None or _SAME_INPUT < unlike < _OTHER_INPUT:
        return None
    return [*steps, *([f"its iteration is given another matrix (cosine {1 - unlike:.3f})"] if unlike >= _OTHER_INPUT else [])]


def _after(seen: WatchedStep, before: Reading, early: Any) -> Reading:
    """What the adapter's readers are given of the copy, after its step."""
    (twin,) = seen.twin.parameters.values()
    optimizer = seen.twin.optimizer
    group = dict(optimizer.param_groups[0])
    return Reading(optimizer, twin, before.weight, group, parameter_state(optimizer, twin), before.gradient, early)


def _singular_values(matrix: Tensor, norm: float) -> NDArray[np.float64]:
    """Of M/‖M‖_F, in falling order; those under 1e-7 are rounding."""
    x = matrix.detach().double().cpu() / norm
    x = x if x.shape[0] <= x.shape[1] else x.mT
    squares: NDArray[np.float64] = np.linalg.eigvalsh((x @ x.mT).numpy())[::-1].clip(0)
    return np.sqrt(squares)


def _distinct(x: NDArray[np.float64]) -> int:
    count, last = 0, np.inf
    for value in x:
        if last / value >= _APART:
            count, last = count + 1, value
    return count


def _clearly_told(match: Match, given: Tensor, norm: float, coarse: bool) -> bool:
    """Whether every step is one polynomial to rounding, and all of them make the output of the input."""
    chain = match.chain
    if chain.output is None or chain.unexplained > _ROUNDING[coarse] or not all(a and b for a, b, _ in chain.triples):
        return False
    x = given.detach().double() * (float(chain.start_norms[match.row]) / norm)
    x = x.mT if match.transposed else x
    for a, b, c in chain.triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    made, output = sample(x)[0].double(), chain.output[match.row].double()
    sign = 1.0 if float((made * output).sum()) >= 0 else -1.0
    return float((made - sign * output).norm()) <= _REPEATED[coarse] * float(output.norm())


def _compare_steps(chain: Chain, coefficients: Coefficients, x: NDArray[np.float64], scale: float, coarse: bool) -> list[str] | None:
    """What its steps do otherwise than those expected, x being the singular values of X₀, and `scale` times them those expected; None between same and other.

    Both polynomials are taken at the singular values of the iterate that was seen: what they differ by is, by the least squares of the fit, what
    the expected one leaves beyond what the fit leaves.
    """
    if len(chain.triples) != len(coefficients):
        return [f"it runs {len(chain.triples)} Newton–Schulz steps, not {len(coefficients)}"]
    most = 0.0
    for number, ((own, left), other) in enumerate(zip(chain.steps, coefficients, strict=True), 1):
        after, expected = ns_map(x, (own,)), ns_map(scale * x if number == 1 else x, (other,))
        distance = float(np.linalg.norm(after - expected) / np.linalg.norm(after))
        if distance > max(_OTHER[coarse], _TIMES_LEFT * left):
            return [f"step {number} has other coefficients ({', '.join(f'{value:.4g}' for value in own)})"]
        most, x = max(most, distance), after
    return [] if most <= _SAME[coarse] else None
