"""Rows for Keller Jordan's Muon, and what the rows of several Muons share."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...diagnostics.newton_schulz.families import JORDAN, repeat_last
from ...diagnostics.quantities.problem import NewtonSchulz
from .adapter import Adapter, Group, Orthogonalisation, Reader, Reading, adam_update, corrected, entry, group_setting, second_moment
from .table import Row


def scaled_output(iteration: Callable[[Reading, Tensor], Tensor], orthogonalisation: Orthogonalisation) -> Reader:
    """A reader of U = s·O in float32, O found by running the optimizer's own iteration once more on a copy of its input."""

    def read(reading: Reading) -> Tensor | None:
        ns_input = orthogonalisation.ns_input(reading)
        if ns_input is None:
            return None
        rows, cols = reading.weight.shape[0], reading.weight[0].numel()
        output = iteration(reading, ns_input.detach().clone()).float().reshape(reading.weight.shape)
        return output * orthogonalisation.output_scale(reading, rows, cols)

    return read


def torch_iteration(reading: Reading, matrix: Tensor) -> Tensor:
    """torch.optim.Muon's iteration, as its module looks it up; it overwrites a bfloat16 `matrix`."""
    from torch.optim import _muon

    group = reading.group
    with torch.no_grad():
        return _muon._zeropower_via_newtonschulz(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])


def _ns_input(reading: Reading) -> Tensor | None:
    """lerp(g, M, μ): what the step leaves in p.grad. Kernels of convolutions go into the iteration as one matrix each."""
    momentum: Tensor | None = reading.state.get("momentum_buffer")
    if momentum is None or reading.gradient is None:
        return None
    return reading.gradient.lerp(momentum, reading.group["momentum"])


def _settings(reading: Reading) -> NewtonSchulz:
    """The function's own defaults; 1e-7 is added to ‖M‖_F, not a bound to it."""
    return NewtonSchulz(repeat_last((JORDAN,), 5), 1e-7)


def _scale(reading: Reading, rows: int, cols: int) -> float:
    """√max(1, m/n) of the gradient's last two axes, which are a kernel's height and width where it has four."""
    shape = reading.weight.shape
    return float(max(1, shape[-2] / shape[-1]) ** 0.5)


_ORTHOGONALISATION = Orthogonalisation(_ns_input, _settings, _scale, batched=True)


def _iteration(reading: Reading, matrix: Tensor) -> Tensor:
    import muon

    with torch.no_grad():
        output: Tensor = muon.zeropower_via_newtonschulz5(matrix.flatten(1) if matrix.ndim == 4 else matrix, steps=5)
    return output


_MUON = Adapter(
    "exact NS input: momentum after Nesterov mixing, before the cast to bfloat16",
    momentum=entry("momentum_buffer"),
    decoupled_decay=group_setting("weight_decay"),
    intended=scaled_output(_iteration, _ORTHOGONALISATION),
    orthogonalisation=_ORTHOGONALISATION,
)


def _adam_update(reading: Reading) -> Tensor | None:
    """m̂/(√v̂ + ε), in float32."""
    state, group = reading.state, reading.group
    if "exp_avg" not in state:
        return None
    first, second = (1 - beta ** state["step"] for beta in group["betas"])
    return adam_update(state["exp_avg"], state["exp_avg_sq"], first, second, group["eps"])


_ADAM = Adapter(
    "first moment exp_avg after the step; the optimizer does not orthogonalise this group",
    momentum=entry("exp_avg"),
    second_moment=second_moment("exp_avg_sq"),
    averages=corrected(),
    decoupled_decay=group_setting("weight_decay"),
    intended=_adam_update,
)


def _muon_or_adam(group: Group) -> Adapter:
    return _MUON if group["use_muon"] else _ADAM


ROWS: dict[str, Row] = {
    "muon.SingleDeviceMuon": _MUON,
    "muon.SingleDeviceMuonWithAuxAdam": _muon_or_adam,
    # A rank keeps the state of the parameters that it steps; of the others it has nothing to read.
    "muon.Muon": _MUON,
    "muon.MuonWithAuxAdam": _muon_or_adam,
}
