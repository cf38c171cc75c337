"""Rows for microsoft/dion: Dion, and a Muon and a NorMuon whose Newton–Schulz function runs on all matrices of one shape at once.

Read from the repository's source: classes, group settings, state, steps, scales and the iterations. Several of its functions are
compiled; what a compiler fuses may differ in the last bit of float32 before the cast to bfloat16.
"""

from collections.abc import Callable
from math import nan, sqrt

from torch import Tensor

from ...diagnostics.newton_schulz.families import FAMILIES, Coefficients
from ...diagnostics.quantities.problem import NewtonSchulz
from .adapter import NOT_ORTHOGONAL, Adapter, Group, Orthogonalisation, Reading, entry, group_setting, number, second_moment
from .table import Row

# By the name of the library's function; of a function of the user's own nothing is known.
_SCHEDULES: dict[str, Coefficients] = {
    "polar_express": FAMILIES["polar_express_speedrun"].coefficients,
    "polar_express_triton": FAMILIES["polar_express_speedrun"].coefficients,
    "zeropower_via_newtonschulz5": FAMILIES["you"].coefficients,
    "newton_schulz_triton": FAMILIES["you"].coefficients,
    "newton_schulz_triton_fast": FAMILIES["aol_flash"].coefficients,
}


def _ns_input(reading: Reading) -> Tensor | None:
    """M, or g + μM under Nesterov, cast to bfloat16 before the iteration sees it."""
    momentum, group = reading.state.get("momentum"), reading.group
    if momentum is None or reading.gradient is None:
        return None
    mixed: Tensor = momentum * group["mu"] + reading.gradient.to(momentum.dtype) if group["nesterov"] else momentum
    return mixed.bfloat16()


def _settings(reading: Reading) -> NewtonSchulz | None:
    """The schedule of the function that was chosen; its ε is handed over from the group."""
    function = getattr(reading.optimizer, "_newton_schulz_func", None)
    name = getattr(function, "__name__", "")
    if name not in _SCHEDULES or not str(getattr(function, "__module__", "")).startswith("dion."):
        return None
    eps = number(reading.group.get("epsilon"))
    return NewtonSchulz(_SCHEDULES[name], eps, scaling="aol" if name == "newton_schulz_triton_fast" else "frobenius")


def _scale(reading: Reading, rows: int, cols: int) -> float:
    match reading.group.get("adjust_lr"):
        case "spectral_norm":
            return sqrt(rows / cols)
        case "rms_norm":
            return 0.2 * sqrt(max(rows, cols))
        case None:
            return 1.0
        case _:
            return nan


def _decay(reading: Reading) -> float:
    """λ; missing where it is cautious, and acts only where update and weight agree in sign."""
    return nan if reading.group.get("cautious_wd") else group_setting("weight_decay")(reading)


def _in_blocks(group: Group) -> bool:
    """Whether the rows of a matrix are orthogonalised head by head, or block by block of a fused projection."""
    return (group.get("num_heads") or 1) > 1 or group.get("split_sizes") is not None


def _rows(of_matrices: Callable[[Group], Adapter]) -> Row:
    """The row of a class whose groups choose among a matrix method, AdamW and Lion by their setting `algorithm`."""
    others = {"adamw": _ADAMW, "lion": _LION}
    return lambda group: others.get(group.get("algorithm", "")) or of_matrices(group)


_MOMENTUM = entry("momentum")
_LION = Adapter(f"momentum after the step; {NOT_ORTHOGONAL}", momentum=_MOMENTUM, decoupled_decay=_decay)
_ADAMW = Adapter(
    f"first moment momentum after the step; {NOT_ORTHOGONAL}",
    momentum=_MOMENTUM,
    second_moment=second_moment("variance"),
    decoupled_decay=_decay,
)
_DION = Adapter(
    "momentum after the step, from which error feedback has taken what the low-rank update applied; no Newton–Schulz iteration follows",
    momentum=_MOMENTUM,
    decoupled_decay=_decay,
)
_EXACT = "exact NS input: momentum after Nesterov mixing, cast to bfloat16"
_BLOCKS = "momentum after the step; its rows are orthogonalised in blocks, which are not recorded one by one"


def _muon(group: Group) -> Adapter:
    if _in_blocks(group):
        return Adapter(_BLOCKS, momentum=_MOMENTUM, decoupled_decay=_decay)
    orthogonalisation = Orthogonalisation(_ns_input, _settings, _scale, batched=not group.get("flatten"))
    return Adapter(_EXACT, momentum=_MOMENTUM, decoupled_decay=_decay, orthogonalisation=orthogonalisation)


def _row_divisors(reading: Reading) -> Tensor | None:
    """√v + 1e-8 of every row, v being the average of their mean squares that this step has left."""
    v = reading.state.get("variance_neuron")
    return None if v is None else v.sqrt() + 1e-8


def _normuon(group: Group) -> Adapter:
    """Rows are divided by the root of their second moment, and the norm of O restored: more than a scale, of the same size."""
    of_rows = second_moment("variance_neuron", "of_orthogonalised")
    if _in_blocks(group):
        return Adapter(_BLOCKS, momentum=_MOMENTUM, second_moment=of_rows, decoupled_decay=_decay)
    return Adapter(
        _EXACT,
        momentum=_MOMENTUM,
        second_moment=of_rows,
        decoupled_decay=_decay,
        orthogonalisation=Orthogonalisation(
            _ns_input,
            _settings,
            _scale,
            lambda reading, rows, cols: _scale(reading, rows, cols) / sqrt(max(rows, cols)),
            _row_divisors,
            batched=not group.get("flatten"),
        ),
    )


ROWS: dict[str, Row] = {
    "dion.dion.Dion": _rows(lambda group: _DION),
    "dion.dion_simple.Dion": _rows(lambda group: _DION),
    "dion.muon.Muon": _rows(_muon),
    "dion.normuon.NorMuon": _rows(_normuon),
}
