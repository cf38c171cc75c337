"""Whether an update's size leaves what it used to be: jumps from one record to the next, and drifts over the run."""

from collections.abc import Iterator

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from ...diagnostics.finding import Finding
from .matrices import count, group, names

PAST = 20  # records that a record is compared with
BLOCK = 64  # records that are compared at a time: each is copied 20 times
# Both must be passed. Of 10⁶ records of normal noise in the log, 43 passed z alone (20 records tell a width poorly); with the factor
# none did at standard deviations of 0.1, 0.2 and 0.25, 11 at 0.3. Orthogonalised updates have under 0.05.
FACTOR = 3.0
ROBUST_Z = 8.0
_MAD = 1.4826  # standard deviation over median absolute deviation, of a normal distribution


def spike(run: xr.DataTree) -> Iterator[Finding]:
    """Update RMS per learning rate is a factor of 3 off the median of the 20 records before, and 8 robust standard deviations in its log.

    The learning rate is taken out, so that schedules are no spikes. A matrix that was not recorded at one of the 20 is not judged.
    """
    update = group(run, "update")
    size = _log_size(update)
    if len(size) <= PAST:
        return
    past = np.lib.stride_tricks.sliding_window_view(size[:-1], PAST, axis=0)
    away = size[PAST:].copy()
    spiked = np.empty(away.shape, bool)
    for start in range(0, len(past), BLOCK):
        block = slice(start, start + BLOCK)
        median = np.median(past[block], axis=-1)
        spread = _MAD * np.median(np.abs(past[block] - median[..., None]), axis=-1)
        away[block] -= median
        with np.errstate(invalid="ignore"):
            spiked[block] = (np.abs(away[block]) > np.log(FACTOR)) & (np.abs(away[block]) > ROBUST_Z * spread)
    if spiked.any():
        concerned = spiked.any(axis=0)
        largest = np.where(spiked, np.abs(away), 0).max(axis=1)
        first, worst = int(update["step"].values[PAST:][largest > 0][0]), int(update["step"].values[PAST:][largest.argmax()])
        factor = float(np.exp(away[largest.argmax()][np.argmax(np.where(spiked, np.abs(away), 0)[largest.argmax()])]))
        yield Finding(
            "update_spike", "warning",
            f"The update of {count(concerned)} jumped to up to {factor:.3g} times what it was in the {PAST} records before (step {worst}; the first time at step {first}).",
            "Look at the loss and the data of these steps; clip gradients, or lower β₂ if second moments lag behind.",
            names(update, concerned), {"factor": factor, "step": worst, "first_step": first, "records": spiked.sum()},
        )  # fmt: skip


def drift(run: xr.DataTree) -> Iterator[Finding]:
    """Update RMS per learning rate in the last quarter of the records is a factor of 3 off that in the second quarter, and 8 standard errors.

    The first quarter is left out: averages that begin at zero, and warm-up.
    """
    update = group(run, "update")
    size = _log_size(update)
    quarter = len(size) // 4
    if quarter < 5:
        return
    early, late = (size[part] for part in (slice(quarter, 2 * quarter), slice(-quarter, None)))
    change = np.median(late, axis=0) - np.median(early, axis=0)
    spread = np.maximum(*(_MAD * np.median(np.abs(part - np.median(part, axis=0)), axis=0) for part in (early, late)))
    with np.errstate(invalid="ignore"):
        # The standard error of a median is √(π/2) that of a mean, of a difference of two √2 that of one.
        drifted = (np.abs(change) > np.log(FACTOR)) & (np.abs(change) > ROBUST_Z * spread * np.sqrt(np.pi / quarter))
    if drifted.any():
        factor = float(np.exp(change[np.argmax(np.where(drifted, np.abs(change), 0))]))
        yield Finding(
            "update_drift", "info",
            f"The updates per learning rate of {count(drifted)} drift: in the last quarter of the run they are {factor:.3g} times what they were in the second, where they changed most.",
            "Nothing for SGD, whose updates follow the gradients; elsewhere look for vanishing gradients, ε, or growing second moments.",
            names(update, drifted), {"factor": factor},
        )  # fmt: skip


def _log_size(update: xr.Dataset) -> NDArray[np.float64]:
    """Log of the update's RMS per learning rate, NaN where there was none; decay is left in where its kind is not known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        per_lr: ArrayLike = update["update_rms_per_lr"].values
        size = np.log(np.where(np.isfinite(per_lr), per_lr, update["update_rms"].values / update["lr"].values))
    return np.where(np.isfinite(size), size, np.nan)


RULES = (spike, drift)
