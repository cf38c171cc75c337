"""Muons of a user's own, of which only the class's name and the updates are known: whether these look like a known mistake.

Without an adapter there is neither a target nor a residual. But O's entries have RMS a/√max(m, n) with a between 0.8 and 1.15 for every
list of coefficients in use, so that the RMS of ΔW/η over several shapes tells the scaling that was applied.
"""

from collections.abc import Iterator

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from ...diagnostics.catalogue import READABLE_NOISE
from ...diagnostics.finding import Finding
from ...diagnostics.quantities.update_size import ADAMW_RMS
from .matrices import count, group, names, typical
from .size_causes import MAJORITY

# a of Jordan's coefficients at 3 to 8 steps (0.85 to 0.98), and the edges of the bands of others.
BAND = (0.8, 1.15)
# Spread of ‖ΔW/η‖_F over a run under which it is a constant: one of orthogonalised updates varies by more than 0.1 %.
CONSTANT = 1e-3
LEAST_RECORDS = 5
# Slope of log update over log momentum, of nine of ten matrices and of the median: under 0.18 in every orthogonalised update that was
# tried, 1 far under the iteration's eps, and between where the iteration still lifts a part of the singular values.
FOLLOWS = (0.2, 0.5)
_TEACH = "If that is meant, let an adapter say so (register_adapter)."


def own_muons(run: xr.DataTree) -> Iterator[Finding]:
    """For classes with "muon" in their name that are not in the adapter table, in this order:

    updates that follow the momentum's size (log–log slope over 0.5 in the median matrix, where orthogonalised ones do not);
    updates of a constant Frobenius norm that is M/‖M‖_F times a usual scale; RMS a in all shapes (√max without 0.2); RMS
    0.2·√max(m, n) (√max on what is normalised already). Silent where the RMS is AdamW's 0.2, and where it fits no mistake.
    """
    update, geometry = group(run, "update"), group(run, "geometry")
    for entry in run.attrs.get("optimizers", ()):
        label, read_by = str(entry.get("label")), entry.get("read_by", ())
        own = update["optimizer"].values == label
        orthogonal = (geometry["ns_schedule"].values >= 0).any(axis=0) & (geometry["optimizer"].values == label)
        # What was seen by watching is what the class does; whether it is what was meant only an adapter says.
        watched = any(one.get("iterations") for one in entry.get("watched", ()))
        if "muon" not in label.lower() or "table" in read_by or not own.any() or (orthogonal.any() and not watched):
            continue
        mine = update.isel(matrix=np.flatnonzero(own))
        with np.errstate(divide="ignore", invalid="ignore"):
            # Decay is left in where its kind is not known: per learning rate it is λ·RMS(W), small against 0.2.
            per_lr = np.where(
                np.isfinite(mine["update_rms_per_lr"].values),
                mine["update_rms_per_lr"].values,
                mine["update_rms"].values / mine["lr"].values,
            )
        usable = np.isfinite(per_lr) & (per_lr > 0) & (mine["update_noise"].values <= READABLE_NOISE)
        per_lr = np.where(usable, per_lr, np.nan)
        kept = usable[len(usable) // 2 :].sum(axis=0) >= LEAST_RECORDS
        if kept.any():
            yield from _mistake(label, mine.isel(matrix=np.flatnonzero(kept)), per_lr[:, kept])


def _mistake(label: str, update: xr.Dataset, per_lr: NDArray[np.float64]) -> Iterator[Finding]:
    rows, cols = update["rows"].values, update["cols"].values
    rms = typical(per_lr[len(per_lr) // 2 :])  # averages that are not corrected for their zero start make early updates too large
    side = np.sqrt(np.maximum(rows, cols))
    everyone = np.ones(len(rows), bool)
    who, concerned = f"{label} ({count(everyone)})", names(update, everyone)
    follows = _follows(per_lr, update["momentum_rms"].values)
    frobenius = per_lr * np.sqrt(rows * cols)
    constant = np.nanstd(frobenius, axis=0) < CONSTANT * np.nanmean(frobenius, axis=0)
    scales = {"0.2·√max(rows, cols)": ADAMW_RMS * side, "1": np.ones(len(rows)), "√max(1, rows/cols)": np.sqrt(np.maximum(1, rows / cols))}
    only_normalised = [text for text, scale in scales.items() if _most(constant & np.isclose(typical(frobenius), scale, rtol=0.01))]
    if _most(follows > FOLLOWS[0]) and np.nanmedian(follows) > FOLLOWS[1]:
        yield Finding(
            "update_follows_momentum", "error",
            f"{who}: updates grow and shrink with the momentum (log–log slope {np.nanmedian(follows):.2f}); orthogonalised ones do not depend on its size.",
            f"Check that ‖M‖_F is far above the iteration's eps, and that M is divided by its norm. {_TEACH}", concerned,
            {"slope": float(np.nanmedian(follows))},
        )  # fmt: skip
    elif only_normalised:
        yield Finding(
            "only_normalised", "error",
            f"{who}: every update has exactly the Frobenius norm of M/‖M‖_F times {only_normalised[0]}: it is normalised, not orthogonalised.",
            f"Check that Newton–Schulz runs, and for how many steps. {_TEACH}", concerned, {"rms_per_lr": float(np.median(rms))},
        )  # fmt: skip
    elif _within(rms / ADAMW_RMS):
        return
    elif _within(rms) and not np.allclose(rms, 1, atol=1e-3):  # 1 exactly is an update of signs
        yield Finding(
            "factor_missing", "warning",
            f"{who}: update RMS per learning rate is {np.median(rms):.2f} in every shape, about five times AdamW's 0.2: "
            "this looks like Muon scaled by √max(rows, cols) without the factor 0.2.",
            f"Scale by 0.2·√max(rows, cols). {_TEACH}", concerned, {"rms_per_lr": float(np.median(rms))},
        )  # fmt: skip
    elif _within(rms / (ADAMW_RMS * side)) and np.ptp(np.log(side)) > 0.1:
        yield Finding(
            "scaled_twice", "error",
            f"{who}: update RMS per learning rate is {np.median(rms):.2f} and grows as 0.2·√max(rows, cols), where 0.2 is meant for every shape.",
            f"Scale what is normalised already (AdaMuon's O/√V) by 0.2 alone, √max(rows, cols) belongs to O. {_TEACH}", concerned,
            {"rms_per_lr": float(np.median(rms)), "factor": float(np.median(rms / ADAMW_RMS))},
        )  # fmt: skip


def _follows(per_lr: NDArray[np.float64], momentum: ArrayLike) -> NDArray[np.float64]:
    """Slope of log update over log momentum across the records of every matrix; NaN where the momentum varies by less than a factor of 2."""
    slopes = np.full(per_lr.shape[1], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = np.log(np.asarray(momentum, dtype=np.float64)), np.log(per_lr)
    for j in range(per_lr.shape[1]):
        both = np.isfinite(x[:, j]) & np.isfinite(y[:, j])
        if both.sum() >= LEAST_RECORDS and np.ptp(x[both, j]) > np.log(2):
            centred = x[both, j] - x[both, j].mean()
            slopes[j] = centred @ y[both, j] / (centred @ centred)
    return slopes


def _within(ratio: NDArray[np.float64]) -> bool:
    return _most((ratio >= BAND[0]) & (ratio <= BAND[1]))


def _most(holds: NDArray[np.bool_]) -> bool:
    return bool(holds.mean() >= MAJORITY)


RULES = (own_muons,)
