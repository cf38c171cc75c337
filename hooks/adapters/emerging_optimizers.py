"""Rows for NVIDIA-NeMo/Emerging-Optimizers: Muon and AdaptiveMuon.

Read from the repository's source, old and new. Where settings are kept has moved: momentum from `momentum_beta` to `momentum` in the
group, Nesterov mixing from `use_nesterov` in the group to an attribute, those of the iteration from variables that a function has
closed over to attributes.
"""

from math import nan, sqrt
from typing import Any

from torch import Tensor

from ...diagnostics.newton_schulz.families import FAMILIES
from ...diagnostics.quantities.problem import NewtonSchulz
from .adapter import Adapter, Orthogonalisation, Reading, SecondMoment, entry, number
from .table import Row, class_name

_MUON = "emerging_optimizers.orthogonalized_optimizers.muon.Muon"
_ADAPTIVE = "emerging_optimizers.orthogonalized_optimizers.adaptive_muon.AdaptiveMuon"

# When there are more steps than triples, these begin anew, those hold the last.
_CYCLED = {"simple": FAMILIES["jordan"], "quintic": FAMILIES["you"], "aol": FAMILIES["aol_nvidia"]}
_HELD = {
    "polar_express": FAMILIES["polar_express_nvidia"],
    "cans": FAMILIES["cans"],
    "deepseekv4": FAMILIES["deepseek_v4"],
    "cubic5": FAMILIES["cubic5"],
}


def _setting(reading: Reading, *names: str) -> Any:
    """A setting under the first of its names that is there: in the group, on the optimizer, or in its function's closure; else None."""
    function = getattr(reading.optimizer, "scaled_orthogonalize_fn", None)
    variables = getattr(getattr(function, "__code__", None), "co_freevars", ())
    closed_over = {v: cell.cell_contents for v, cell in zip(variables, getattr(function, "__closure__", None) or (), strict=False)}
    places = (reading.group, vars(reading.optimizer), closed_over)
    return next((place[name] for place in places for name in names if name in place), None)


def _ns_input(reading: Reading) -> Tensor | None:
    """M, or (1 − μ)g + μM under Nesterov. Missing for a class derived from these two, which may cut the matrix into pieces."""
    buffer, gradient = reading.state.get("momentum_buffer"), reading.gradient
    if buffer is None or gradient is None or class_name(type(reading.optimizer)) not in (_MUON, _ADAPTIVE):
        return None
    if not _setting(reading, "nesterov", "use_nesterov"):
        momentum: Tensor = buffer
        return momentum
    if _decay_kind(reading) == "l2":
        gradient = gradient.add(reading.weight, alpha=number(reading.group["weight_decay"]))
    return gradient.lerp(buffer, _setting(reading, "momentum", "momentum_beta"))


def _settings(reading: Reading) -> NewtonSchulz | None:
    kind, steps = _setting(reading, "coefficient_type"), _setting(reading, "num_ns_steps")
    if not isinstance(steps, int):
        return None
    if kind in _CYCLED:
        return NewtonSchulz(_CYCLED[kind].schedule(steps, "cycle"), 1e-7)
    return NewtonSchulz(_HELD[kind].schedule(steps, "repeat"), 1e-7) if kind in _HELD else None


def _decay_kind(reading: Reading) -> str:
    method = _setting(reading, "weight_decay_method")
    if method is None and _setting(reading, "use_independent_wd"):
        return "independent"
    if method is None:
        return "decoupled" if _setting(reading, "use_decoupled_wd", "use_decoupled_weight_decay") else "l2"
    return str(method)


def _decay(reading: Reading) -> float:
    """λ in W(1 − ηλ), which is λ/η where decay is independent of η."""
    decay, lr = number(reading.group.get("weight_decay", 0.0)), number(reading.group["lr"])
    match _decay_kind(reading):
        case "decoupled":
            return decay
        case "independent":
            return decay / lr if lr else nan
        case "l2":
            return 0.0
        case _:
            return nan if decay else 0.0


def _scale(reading: Reading, rows: int, cols: int) -> float:
    modes = {"spectral": sqrt(max(rows, cols)), "shape_scaling": sqrt(max(1, rows / cols)), "unit_rms_norm": sqrt(rows / cols)}
    mode = _setting(reading, "scale_mode")
    return modes[mode] * number(_setting(reading, "extra_scale_factor")) if mode in modes else nan


def _adaptive_target(reading: Reading, rows: int, cols: int) -> float:
    """RMS of scale·O for an exact polar factor. The class divides O by √V, which makes its RMS 1 where that of O is 1/√max(m, n), and
    scales it as if it were still O: its updates are √max(m, n) times this target. Missing for its NAMO, which follows the gradient's norm,
    and in older versions, where the scale came first and so had no effect."""
    of_orthogonalised = hasattr(reading.optimizer, "scale_mode") and _setting(reading, "moment2_method") != "namo"
    return _scale(reading, rows, cols) / sqrt(max(rows, cols)) if of_orthogonalised else nan


def _adaptive_second_moment(reading: Reading) -> SecondMoment | None:
    """Of every coordinate, or of the rows of a tall matrix and the columns of a wide one; NAMO's is of the gradient's squared norm."""
    values = reading.state.get("moment2_buffer")
    if not isinstance(values, Tensor):
        return None
    if _setting(reading, "moment2_method") == "namo":
        return SecondMoment(values / reading.weight.numel(), "scalar")
    return SecondMoment(values, "of_orthogonalised")


_MOMENTUM = entry("momentum_buffer")
_EXACT = "exact NS input: momentum after Nesterov mixing"

ROWS: dict[str, Row] = {
    _MUON: Adapter(_EXACT, momentum=_MOMENTUM, decoupled_decay=_decay, orthogonalisation=Orthogonalisation(_ns_input, _settings, _scale)),
    _ADAPTIVE: Adapter(
        _EXACT,
        momentum=_MOMENTUM,
        second_moment=_adaptive_second_moment,
        decoupled_decay=_decay,
        orthogonalisation=Orthogonalisation(_ns_input, _settings, lambda reading, rows, cols: nan, _adaptive_target),
    ),
}
