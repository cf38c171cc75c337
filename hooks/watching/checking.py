"""Whether a class does what its row in the adapter table says: one of its steps, watched on a copy of one matrix."""

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

from torch import Tensor

from ...diagnostics.newton_schulz.families import Coefficients
from ..adapters import Adapter, Group, Reading, parameter_state
from .iterated import from_norm
from .trace import sample
from .watched_step import WatchedStep, watch_step

_SMALLEST = 5  # side of a matrix whose iteration is told
_WITHIN = 0.03  # relative distance of coefficients that are the same, c of a first step aside
_UNLIKE = 1e-3  # 1 − cosine of inputs that are not the same


def differs(optimizer: Any, group: Group, adapter: Adapter, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What the coming step of a group does otherwise than its adapter says, in words; empty where it does the same, None where no step tells.

    Raises:
        Exception: whatever keeps a copy from being made or stepped.
    """
    ns = adapter.orthogonalisation
    matrices = [p for p in group["params"] if p.ndim == 2 and min(p.shape) >= _SMALLEST and p.grad is not None and bool(p.grad.any())]
    if ns is None or adapter.stacks is not None or not matrices:
        return None
    parameter = min(matrices, key=Tensor.numel)
    before = Reading(optimizer, parameter, parameter.detach(), dict(group), parameter_state(optimizer, parameter), parameter.grad)
    early = None if adapter.before is None else adapter.before(before)
    seen = watch_step(optimizer, group, [parameter], args, kwargs)
    if len(seen.matches) != 1 or seen.matches[0].piece.part != "whole":
        return None
    reading = _after(seen, before, early)
    settings, given = ns.settings(reading), ns.ns_input(reading)
    if settings is None or given is None or settings.scaling != "frobenius":
        return None
    match = seen.matches[0]
    found = from_norm(tuple(match.chain.triples), float(match.chain.start_norms[match.row]))
    if len(found) != len(settings.coefficients):
        return f"it runs {len(found)} Newton–Schulz steps, not {len(settings.coefficients)}"
    if not _same(found, settings.coefficients):
        return f"it runs other coefficients than are expected of it (the first: {', '.join(f'{value:.4g}' for value in match.chain.triples[0])})"
    own = seen.input_of(0)
    if own is None:
        return ""
    x, y = sample(own)[0].double(), sample(given.reshape(own.shape))[0].double()
    unlike = 1 - abs(float((x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-300)))
    return f"its iteration is given another matrix than is expected of it (cosine {1 - unlike:.3f})" if unlike > _UNLIKE else ""


def _after(seen: WatchedStep, before: Reading, early: Any) -> Reading:
    """What the adapter's readers are given of the copy, after its step."""
    (twin,) = seen.twin.parameters.values()
    optimizer = seen.twin.optimizer
    return Reading(
        optimizer, twin, before.weight, dict(optimizer.param_groups[0]), parameter_state(optimizer, twin), before.gradient, early
    )


def _same(found: Coefficients, expected: Coefficients) -> bool:
    """Within what bfloat16 tells; of the first step c is hardly told."""
    pairs = [
        (x, y)
        for step, (one, other) in enumerate(zip(found, expected, strict=True))
        for x, y in zip(one[: 2 if step == 0 else 3], other, strict=False)
    ]
    return all(isclose(x, y, rel_tol=_WITHIN, abs_tol=0.02) for x, y in pairs)
