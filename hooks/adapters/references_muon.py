"""Rows for the reference optimizers in `examples/optimizers` that run a Newton–Schulz iteration.

Every NS input is the tensor that the iteration was given, to the bit, before its cast: state after the step and the copied gradient
hold all that it is made of.
"""

from collections.abc import Sequence
from math import nan, sqrt

from torch import Tensor

from ...diagnostics.newton_schulz.families import repeat_last
from ...diagnostics.quantities.problem import NewtonSchulz
from .adapter import Adapter, Group, Orthogonalisation, Reading, entry, group_setting, second_moment
from .table import Row
from .torch_optim import as_triples
from .variance_reduced import corrected_gradient

_MOMENTUM = entry("momentum_buffer")
_DECAY = group_setting("weight_decay")


def _mixed(reading: Reading) -> Tensor | None:
    """(1 − μ)g + μM under Nesterov, else M."""
    momentum, group = _MOMENTUM(reading), reading.group
    if momentum is None or not group.get("nesterov", True):
        return momentum
    return None if reading.gradient is None else reading.gradient.lerp(momentum, group["momentum"])


def _settings(reading: Reading) -> NewtonSchulz:
    group = reading.group
    eps = group["ns_eps"] if "ns_eps" in group else group["eps"]
    return NewtonSchulz(repeat_last(as_triples(group["ns_coefficients"]), int(group["ns_steps"])), float(eps))


def _moonlight_scale(reading: Reading, rows: int, cols: int) -> float:
    """0.2√max(m, n), which gives an exact polar factor the RMS 0.2."""
    return 0.2 * sqrt(max(rows, cols))


def _adamuon_ns_input(reading: Reading) -> Tensor | None:
    """M, or the sign of (1 − β)g + βM."""
    if not reading.group["sign"]:
        return _MOMENTUM(reading)
    mixed = _mixed(reading)
    return None if mixed is None else mixed.sign()


def _mars_m_corrected(reading: Reading) -> Tensor | None:
    beta = reading.group["momentum"]
    return corrected_gradient(reading, reading.group["gamma"] * beta / (1 - beta))


def _root_ns_input(reading: Reading) -> Tensor | None:
    """g + μM under Nesterov, else M, clipped to the threshold of this step."""
    momentum, threshold = _MOMENTUM(reading), reading.state.get("threshold")
    if momentum is None or threshold is None or reading.gradient is None:
        return None
    direction = reading.gradient.add(momentum, alpha=reading.group["momentum"]) if reading.group["nesterov"] else momentum
    return direction.clamp(-threshold, threshold)


def _root_settings(reading: Reading) -> NewtonSchulz:
    coefficients = reading.optimizer.coefficients(tuple(reading.weight.shape), reading.group)
    return NewtonSchulz(repeat_last(as_triples(coefficients), int(reading.group["ns_steps"])), float(reading.group["eps"]))


def _turbo_settings(reading: Reading) -> NewtonSchulz:
    coefficients = reading.group["aol_coefficients"]
    return NewtonSchulz(as_triples(coefficients) if coefficients else (), float(reading.group["eps"]), scaling="aol")


def _teon_stacks(group: Group) -> Sequence[Sequence[Tensor]]:
    params, size = group["params"], group["stack"]
    return [params[i : i + size] for i in range(0, len(params), size)]


def _teon_scale(reading: Reading, rows: int, cols: int) -> float:
    return sqrt(rows / cols)


def _teon_target(reading: Reading, rows: int, cols: int) -> float:
    """Missing but for a stack of one: how a polar factor's length is shared among the layers depends on their momenta."""
    alone = any(len(stack) == 1 and stack[0] is reading.parameter for stack in _teon_stacks(reading.group))
    return _teon_scale(reading, rows, cols) / sqrt(max(rows, cols)) if alone else nan


_PACKAGE = "optiscope.examples.optimizers"

ROWS: dict[str, Row] = {
    f"{_PACKAGE}.adamuon.AdaMuon": Adapter(
        "exact NS input: momentum after the step, or with sign=True the sign of it after Nesterov mixing; before the cast to the iteration's format",
        momentum=_MOMENTUM,
        second_moment=second_moment("second_momentum_buffer", "of_orthogonalised"),
        decoupled_decay=_DECAY,
        # An elementwise division follows, and whatever comes out of it is brought to RMS 0.2.
        orthogonalisation=Orthogonalisation(_adamuon_ns_input, _settings, lambda reading, rows, cols: nan, lambda reading, rows, cols: 0.2),
    ),
    f"{_PACKAGE}.amo_muon.AMOMuon": Adapter(
        "exact NS input: momentum after Nesterov mixing, before the cast to the iteration's format",
        momentum=_MOMENTUM,
        decoupled_decay=_DECAY,
        orthogonalisation=Orthogonalisation(_mixed, _settings, _moonlight_scale),
    ),
    f"{_PACKAGE}.mars_m.MARSM": Adapter(
        "exact NS input: momentum of the corrected and clipped gradients, before the cast to the iteration's format",
        momentum=_MOMENTUM,
        decoupled_decay=_DECAY,
        orthogonalisation=Orthogonalisation(_MOMENTUM, _settings, _moonlight_scale),
        before=_mars_m_corrected,
        correction=lambda reading: reading.before,
    ),
    f"{_PACKAGE}.root.ROOT": Adapter(
        "exact NS input: momentum after Nesterov mixing, its outliers clipped, before the cast to the iteration's format",
        momentum=_MOMENTUM,
        decoupled_decay=_DECAY,
        orthogonalisation=Orthogonalisation(_root_ns_input, _root_settings, _moonlight_scale),
    ),
    f"{_PACKAGE}.teon.TEON": Adapter(
        "exact NS input: momenta of a stack's layers side by side, before the cast to the iteration's format",
        momentum=_MOMENTUM,
        decoupled_decay=_DECAY,
        orthogonalisation=Orthogonalisation(_MOMENTUM, _settings, _teon_scale, _teon_target),
        stacks=_teon_stacks,
    ),
    f"{_PACKAGE}.turbo_muon.TurboMuon": Adapter(
        "NS input: momentum after Nesterov mixing, before it is scaled to almost orthogonal rows and cast to the iteration's format",
        momentum=_MOMENTUM,
        decoupled_decay=_DECAY,
        orthogonalisation=Orthogonalisation(_mixed, _turbo_settings, _moonlight_scale),
    ),
}
