"""Rows for NVIDIA-NeMo/Emerging-Optimizers: Muon and AdaptiveMuon.

Read from the repository's source, old and new. Where settings are kept has moved: momentum from `momentum_beta` to `momentum` in the
group, Nesterov mixing from `use_nesterov` in the group to an attribute, those of the iteration from variables that a function has
closed over to attributes.
"""

from math import nan, sqrt
from typing import Any

from torch import Tensor

from ...diagnostics.ns_families import JORDAN, Coefficients, repeat_last
from ...diagnostics.observation import NewtonSchulz
from .adapter import Adapter, Orthogonalisation, Reading, SecondMoment, entry, number
from .dion import YOU
from .table import Row, class_name

_MUON = "emerging_optimizers.orthogonalized_optimizers.muon.Muon"
_ADAPTIVE = "emerging_optimizers.orthogonalized_optimizers.adaptive_muon.AdaptiveMuon"

# Their Polar Express: the published list over 1.01 to the power of the degree, rounded to four digits.
_POLAR_EXPRESS: Coefficients = (
    (8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985), (1.8726, -1.2307, 0.3585), (1.8564, -1.2132, 0.3568), (1.8750, -1.2500, 0.3750),
)  # fmt: skip

# arXiv 2506.10935, rounded to four digits.
_CANS: Coefficients = (
    (8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630), (3.2866, -2.4647, 0.5074), (2.2737, -1.6447, 0.4162),
)  # fmt: skip

# In spite of its name it starts from M/‖M‖_F, too.
_AOL: Coefficients = ((4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169))

# When there are more steps than triples, these begin anew, those hold the last.
_CYCLED = {"simple": (JORDAN,), "quintic": YOU, "aol": _AOL}
_HELD = {"polar_express": _POLAR_EXPRESS, "cans": _CANS}


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
        return NewtonSchulz(tuple(_CYCLED[kind][i % len(_CYCLED[kind])] for i in range(steps)), 1e-7)
    return NewtonSchulz(repeat_last(_HELD[kind], steps), 1e-7) if kind in _HELD else None


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
