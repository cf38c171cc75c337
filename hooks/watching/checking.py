"""Whether a class does what its row in the adapter table says: one of its steps, watched on a copy of one matrix."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...diagnostics.newton_schulz.spectral_map import ns_map
from ..adapters import Adapter, Group, Reading, parameter_state
from .trace import sample
from .watched_step import WatchedStep, watch_step

_SMALLEST = 5  # side of a matrix whose iteration is told
_READABLE = 0.02  # of ‖M‖_F: what is smaller bfloat16 moves too far
_WITHIN = 0.15  # distance of singular values of the output from the expected: bfloat16 moves them by a few hundredths
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
    match, own = seen.matches[0], seen.input_of(0)
    if own is None:
        return None
    output = match.chain.whole_output(match.row)
    x, o = _singular_values(own, output.mT if match.transposed else output)
    if not np.allclose(o, ns_map(x, settings.coefficients), atol=_WITHIN):
        found = match.chain.triples
        return (
            f"of singular values {_listed(x)} of ‖M‖_F its iteration makes {_listed(o)}, where {_listed(ns_map(x, settings.coefficients))} is expected "
            f"({len(found)} steps were seen, {len(settings.coefficients)} are expected; the first: {', '.join(f'{value:.4g}' for value in found[0])})"
        )
    one, other = sample(own)[0].double(), sample(given.reshape(own.shape))[0].double()
    unlike = 1 - abs(float((one * other).sum() / (one.norm() * other.norm()).clamp_min(1e-300)))
    return f"its iteration is given another matrix than is expected of it (cosine {1 - unlike:.3f})" if unlike > _UNLIKE else ""


def _singular_values(given: Tensor, output: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Singular values of M/‖M‖_F, those that rounding to bfloat16 leaves something of, and what the iteration made of each: uᵀOv.

    What is compared is what an iteration does, not how its steps were told apart: on a spectrum of one value many lists do the same.
    """
    u, sigma, vt = np.linalg.svd(given.detach().double().cpu().numpy(), full_matrices=False)
    x = sigma / max(float(np.linalg.norm(sigma)), 1e-300)
    o = np.einsum("ri,rc,ic->i", u, output.detach().double().cpu().numpy(), vt)
    kept = x > _READABLE
    return x[kept], o[kept]


def _listed(values: NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.3g}" for value in (values if len(values) <= 3 else values[[0, len(values) // 2, -1]]))


def _after(seen: WatchedStep, before: Reading, early: Any) -> Reading:
    """What the adapter's readers are given of the copy, after its step."""
    (twin,) = seen.twin.parameters.values()
    optimizer = seen.twin.optimizer
    return Reading(
        optimizer, twin, before.weight, dict(optimizer.param_groups[0]), parameter_state(optimizer, twin), before.gradient, early
    )
