"""Reading the variance-reduced gradient of MARS and MARS-M: it is averaged and not kept, so it is made again before the step."""

from torch import Tensor

from .adapter import Reading


def corrected_gradient(reading: Reading, factor: float, *, maximize: bool = False) -> Tensor | None:
    """C/max(1, ‖C‖_F) with C = G + factor·(G − G_last), for `Adapter.before`; the state's `last_grad` counts as zero where it is not there.

    In the sign of the gradient: under `maximize` the optimizer works with −G throughout, and keeps that.
    """
    gradient = reading.gradient
    last: Tensor | None = reading.state.get("last_grad")
    if gradient is None:
        return None
    difference = gradient if last is None else gradient + last if maximize else gradient - last
    c = gradient + factor * difference
    clipped: Tensor = c / c.norm().clamp(min=1)
    return clipped
