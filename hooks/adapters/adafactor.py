"""Rows for the three Adafactors: torch's, Transformers' and pytorch_optimizer's.

They keep of the second moment its means over columns and over rows (Shazeer & Stern 2018, Algorithm 4), and find their own
step size, in proportion to RMS(W). That step size is the η of their rows: what weight decay and update are relative to.
"""

from collections.abc import Callable
from math import inf, nan, sqrt

import torch
from torch import Tensor

from .adapter import NOT_ORTHOGONAL, Adapter, Averages, Group, Reading, SecondMoment, entry, group_setting, number
from .table import Row


def multiplied_out(rows: Tensor, columns: Tensor, smallest_mean: float = 0.0) -> Tensor:
    """V̂ = r cᵀ/mean(r) from the means over the columns, shape (…, m), and over the rows, shape (…, n).

    >>> multiplied_out(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    tensor([[1., 1.],
            [3., 3.]])
    """
    mean = rows.mean(-1, keepdim=True).clamp(min=max(smallest_mean, torch.finfo(rows.dtype).tiny))
    return (rows / mean).unsqueeze(-1) * columns.unsqueeze(-2)


def _factors(reading: Reading) -> tuple[Tensor, Tensor] | None:
    state = reading.state
    if "row_var" in state:  # torch's, of shape (…, m, 1) and (…, 1, n)
        return state["row_var"].squeeze(-1), state["col_var"].squeeze(-2)
    return (state["exp_avg_sq_row"], state["exp_avg_sq_col"]) if "exp_avg_sq_row" in state else None


def _second_moment(reading: Reading) -> SecondMoment | None:
    factors = _factors(reading)
    return None if factors is None else SecondMoment(multiplied_out(*factors), "row_col")


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().norm()) / sqrt(tensor.numel())


def _torch_rate(reading: Reading) -> float:
    """α = max(ε₂, RMS(W))·min(η, 1/√t)."""
    group = reading.group
    relative = min(number(group["lr"]), 1 / sqrt(number(reading.state["step"])))
    return max(float(group["eps"][1]), _rms(reading.weight)) * relative


def _torch_decay(reading: Reading) -> float:
    """W loses the share ηλ of itself, not αλ."""
    return number(reading.group["lr"]) * number(reading.group["weight_decay"]) / _torch_rate(reading)


def _relative_rate(group: Group, step: float, smallest_scale: float, weight: Tensor) -> float:
    """α of the paper's section 8, with which Transformers and pytorch_optimizer agree."""
    relative = number(group["lr"])
    if group["relative_step"]:
        relative = min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / sqrt(step))
    return relative * (max(smallest_scale, _rms(weight)) if group["scale_parameter"] else 1.0)


def _transformers_rate(reading: Reading) -> float:
    return _relative_rate(reading.group, number(reading.state["step"]), float(reading.group["eps"][1]), reading.weight)


def _po_rate(reading: Reading) -> float:
    return _relative_rate(reading.group, reading.group.get("step", 0) + 1, float(reading.optimizer.eps2), reading.weight)


def _po_decay(reading: Reading) -> float:
    decay, group = number(reading.group["weight_decay"]), reading.group
    if not decay or not group["weight_decouple"]:
        return 0.0
    return decay / (_po_rate(reading) or nan) if group["fixed_decay"] else decay


def _update(
    rate: Callable[[Reading], float], threshold: Callable[[Reading], float], eps: Callable[[Reading], float] = lambda reading: 0.0
) -> Callable[[Reading], Tensor | None]:
    """A reader of U in float32: g/√V̂, its RMS clipped to the threshold; with momentum, exp_avg over the step size.

    `eps` bounds the mean that torch's divides by, and V̂ by its square.
    """

    def read(reading: Reading) -> Tensor | None:
        averaged, factors = reading.state.get("exp_avg"), _factors(reading)
        if averaged is not None:
            applied: Tensor = averaged.float() / rate(reading)
            return applied
        if factors is None or reading.gradient is None:
            return None
        smallest = eps(reading)
        v = multiplied_out(factors[0].float(), factors[1].float(), smallest).clamp(min=smallest**2)
        update = reading.gradient.float() / v.sqrt()
        return update / max(1.0, _rms(update) / threshold(reading))

    return read


def _torch_eps(reading: Reading) -> float:
    eps = reading.group["eps"][0]
    return float(torch.finfo(reading.weight.dtype).eps if eps is None else eps)


def _averages(reading: Reading) -> Averages:
    """Both factors are averages whose weights add up to 1 from the first step on; ε is added to the squares of the gradient.

    Coupled decay enters the gradient at another place in each of them.
    """
    return Averages(second=1.0, decay_in_gradient=False)


def _torch_averages(reading: Reading) -> Averages:
    """As the others, with V̂ bounded by ε₁²."""
    return Averages(second=1.0, eps=_torch_eps(reading))


# exp_avg is an average of updates, learning rate included, not of gradients.
_SPECTRUM = f"average of updates exp_avg after the step where there is one (beta1), else the gradient; {NOT_ORTHOGONAL}"

ROWS: dict[str, Row] = {
    "torch.optim.Adafactor": Adapter(
        f"gradient; the optimizer keeps no first moment; {NOT_ORTHOGONAL}",
        second_moment=_second_moment,
        averages=_torch_averages,
        learning_rate=_torch_rate,
        decoupled_decay=_torch_decay,
        intended=_update(_torch_rate, group_setting("d"), _torch_eps),
    ),
    "transformers.optimization.Adafactor": Adapter(
        _SPECTRUM,
        momentum=entry("exp_avg"),
        second_moment=_second_moment,
        averages=_averages,
        learning_rate=_transformers_rate,
        decoupled_decay=group_setting("weight_decay"),
        intended=_update(_transformers_rate, group_setting("clip_threshold")),
    ),
    "pytorch_optimizer.optimizer.adafactor.AdaFactor": Adapter(
        _SPECTRUM,
        momentum=entry("exp_avg"),
        second_moment=_second_moment,
        averages=_averages,
        learning_rate=_po_rate,
        decoupled_decay=_po_decay,
        intended=_update(_po_rate, lambda reading: float(getattr(reading.optimizer, "clip_threshold", inf))),
    ),
}
