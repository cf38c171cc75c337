"""Sizes of updates, weights, gradients and momenta, and the learning rate taken out of them."""

import numpy as np
from numpy.typing import NDArray

from .spectrum import ROUNDING_NOISE

Floats = NDArray[np.float64]

# RMS of AdamW's update per learning rate, the size that AdaMuon and Moonlight align Muon-type updates to.
ADAMW_RMS = 0.2

# Residual and alignment read back from weights are reported up to this rounding noise; it shifts ε̃ by at most about 2 %.
READABLE_NOISE = 0.01


def rms(array: NDArray[np.floating]) -> float:
    """Root mean square ‖A‖_F/√(mn), summed in float64. NaN for an empty array."""
    if array.size == 0:
        return float("nan")
    flat = np.asarray(array, dtype=np.float64).ravel()
    return float(np.sqrt(flat @ flat / flat.size))


def update_without_decay(applied: Floats, before: NDArray[np.floating], lr: float, decoupled_decay: float) -> Floats:
    """U = (ΔW − ηλW_t)/η with ΔW = W_t − W_{t+1}: the applied update per learning rate, decoupled weight decay taken out.

    Arrays of one shape in parameter units, ΔW in float64; η = `lr`, λ = `decoupled_decay` (0 for coupled decay, which is inside
    the update and cannot be separated from it). NaN where η = 0. Source: AdaMuon Eq. 9–10, read backwards.
    """
    if lr == 0:
        return np.full_like(applied, np.nan)
    if not decoupled_decay:
        return applied / lr
    update: Floats = np.multiply(before, lr * decoupled_decay, dtype=np.float64)
    np.subtract(applied, update, out=update)
    update /= lr
    return update


def reading_noise(weight_rms: float, update_rms: float, unit_roundoff: float) -> float:
    """Relative rounding error of an update read back as a difference of weights: 0.425·u·RMS(W)/RMS(ΔW).

    Storing W_{t+1} rounds every entry. float32 weights: about 1e-6; bfloat16 weights: often above 1, where most
    entries did not move at all and the difference says nothing about the intended update.
    """
    return float("inf") if update_rms == 0 else ROUNDING_NOISE * unit_roundoff * weight_rms / update_rms
