"""Sizes of updates, weights, gradients and momenta, and the learning rate taken out of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..spectra.spectrum import ROUNDING_NOISE

Floats = NDArray[np.float64]

# RMS of AdamW's update per learning rate, the size that AdaMuon and Moonlight align Muon-type updates to.
ADAMW_RMS = 0.2


# Elements taken at once: what is made of them in float64 stays in the processor's cache, and costs no fresh pages.
_PANEL = 1 << 14


def rms(array: NDArray[np.floating]) -> float:
    """Root mean square ‖A‖_F/√(mn), summed in float64. NaN for an empty array."""
    if array.size == 0:
        return float("nan")
    flat, total = array.reshape(-1), 0.0
    for start in range(0, flat.size, _PANEL):
        panel = np.asarray(flat[start : start + _PANEL], dtype=np.float64)
        total += float(panel @ panel)
    return float(np.sqrt(total / flat.size))


@dataclass(frozen=True)
class Sizes:
    """RMS values of one step: of W_t, of ΔW = W_t − W_{t+1}, and of the update per learning rate (see :func:`update_without_decay`)."""

    weight: float
    applied: float
    update: float


def sizes(before: NDArray[np.floating], after: NDArray[np.floating], lr: float, decoupled_decay: float) -> Sizes:
    """The three sizes in one pass, arithmetic and sums in float64, without a float64 copy of either array, which are not empty."""
    flat = before.reshape(-1), after.reshape(-1)
    squares = np.zeros(3)
    for start in range(0, before.size, _PANEL):
        weight = flat[0][start : start + _PANEL].astype(np.float64)
        applied = weight - flat[1][start : start + _PANEL]
        squares[:2] += weight @ weight, applied @ applied
        if decoupled_decay:
            weight *= lr * decoupled_decay
            applied -= weight
            squares[2] += applied @ applied
    weight_rms, applied_rms, numerator = (float(value) for value in np.sqrt(squares / before.size))
    numerator = numerator if decoupled_decay else applied_rms
    return Sizes(weight_rms, applied_rms, numerator / abs(lr) if lr else float("nan"))


def update_without_decay(
    before: NDArray[np.floating],
    after: NDArray[np.floating],
    lr: float,
    decoupled_decay: float,
    *,
    divided_by: float = 1.0,
    dtype: type[np.floating] = np.float64,
) -> NDArray[np.floating]:
    """U = (W_t − W_{t+1} − ηλW_t)/η: the applied update per learning rate, decoupled weight decay taken out; computed in float64.

    Arrays of one shape in parameter units; η = `lr`, λ = `decoupled_decay` (0 for coupled decay, which is inside the update and
    cannot be separated from it). NaN where η = 0. `divided_by` is taken out too, and the result rounded to `dtype`.
    Source: AdaMuon Eq. 9–10, read backwards.
    """
    update: NDArray[np.floating] = np.full(before.shape, np.nan, dtype=dtype)
    if lr == 0:
        return update
    flat, factor = update.reshape(-1), 1 / (lr * divided_by)
    old, new = before.reshape(-1), after.reshape(-1)
    for start in range(0, flat.size, _PANEL):
        panel = slice(start, start + _PANEL)
        weight = old[panel].astype(np.float64)
        moved = weight - new[panel]
        if decoupled_decay:
            weight *= lr * decoupled_decay
            moved -= weight
        moved *= factor
        flat[panel] = moved
    return update


def reading_noise(weight_rms: float, update_rms: float, unit_roundoff: float) -> float:
    """Relative rounding error of an update read back as a difference of weights: 0.425·u·RMS(W)/RMS(ΔW).

    Storing W_{t+1} rounds every entry. float32 weights: about 1e-6; bfloat16 weights: often above 1, where most
    entries did not move at all and the difference says nothing about the intended update.
    """
    return float("inf") if update_rms == 0 else ROUNDING_NOISE * unit_roundoff * weight_rms / update_rms
