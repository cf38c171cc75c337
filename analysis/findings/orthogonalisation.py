"""Whether the Newton–Schulz iteration gets an input it can orthogonalise, and does so."""

from collections.abc import Iterator

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from ...diagnostics.finding import Finding
from ..run import ns_schedules
from .matrices import count, group, names, typical
from .update_size import alignment

NEAR_EPS = 1e3  # ‖M‖_F/eps under which scale invariance is at risk: X₀ = M/max(‖M‖_F, eps) loses it at 1
ALIGNED = 0.5


def single_row(run: xr.DataTree) -> Iterator[Finding]:
    """A matrix with one singular value."""
    geometry = group(run, "geometry")
    single = np.minimum(geometry["rows"].values, geometry["cols"].values) == 1
    if single.any():
        orthogonal = single & (geometry["ns_schedule"].values >= 0).any(axis=0)
        yield Finding(
            "single_row", "info", f"{count(single)} with a single row or column: one singular value, κ = 1 by definition.",
            "Leave them to AdamW; orthogonalising a vector only normalises it." if orthogonal.any() else "Nothing; pass over their κ.",
            names(geometry, single),
        )  # fmt: skip


def zero_input(run: xr.DataTree) -> Iterator[Finding]:
    """An NS input of norm zero: a note where it is so in the first record alone, as after a projection that starts at zero."""
    geometry = group(run, "geometry")
    zeros = geometry["fro_norm"].values == 0
    at_first = zeros.any(axis=0) & ~zeros[1:].any(axis=0) if len(zeros) > 1 else np.zeros(zeros.shape[1:], bool)
    later = zeros.any(axis=0) & ~at_first
    if later.any():
        yield Finding(
            "zero_input", "warning", f"The NS input (or momentum) of {count(later)} was all zeros in some record; it has no spectrum.",
            "Check that these matrices receive gradients.", names(geometry, later), {"records": zeros[:, later].sum()},
        )  # fmt: skip
    if at_first.any():
        yield Finding(
            "zero_input", "info", f"The NS input (or momentum) of {count(at_first)} was all zeros in the first record alone.",
            "Nothing; a projection that starts at zero lets no gradient through to what is before it.", names(geometry, at_first),
            {"records": int(at_first.sum())},
        )  # fmt: skip


def condition_bounded(run: xr.DataTree) -> Iterator[Finding]:
    """The smallest singular value lies under the rounding noise of the input's storage format."""
    geometry = group(run, "geometry")
    recorded = np.isfinite(geometry["condition_number"].values)
    floors = geometry["condition_is_floor"].values & recorded
    if floors.any():
        share = floors.sum() / recorded.sum()
        yield Finding(
            "condition_bounded", "info",
            f"In {share:.0%} of the snapshots κ is only known to be at least the recorded value: the smallest "
            "singular value lies under the rounding noise of the input.",
            "Nothing, unless it persists after the first steps; then the matrix is rank-deficient.", names(geometry, floors.any(axis=0)),
            {"share": share},
        )  # fmt: skip


def near_eps(run: xr.DataTree) -> Iterator[Finding]:
    """‖M‖_F under 1,000 times the eps that it is divided with: X₀ = M/max(‖M‖_F, eps) and M/(‖M‖_F + eps) are then not scale-free.

    An error where it falls under eps itself: X₀ is then so small that the iteration ends before it has lifted it.
    """
    geometry = group(run, "geometry")
    for i, schedule in enumerate(ns_schedules(geometry)):
        if schedule.scaling != "frobenius" or not schedule.eps:
            continue  # its eps bounds something else than ‖M‖_F
        ratio = geometry["fro_norm"].where(geometry["ns_schedule"] == i).values / schedule.eps
        small = (ratio > 0) & (ratio < NEAR_EPS)
        if small.any():
            least, share = float(ratio[small].min()), (ratio[small] < 1).sum() / (ratio > 0).sum()
            text = f"‖M‖_F falls to {least:.3g} times the optimizer's eps ({schedule.eps:g})"
            if share:
                text += (
                    f" and is below it in {share:.0%} of the records: these updates are not orthogonalised, they shrink with the gradient."
                )
            else:
                text += "; below eps the update shrinks with it."
            yield Finding(
                "norm_near_eps", "error" if share else "warning", text, "Lower eps (1e-15 is safe in float32), or scale the loss.",
                names(geometry, small.any(axis=0)), {"norm_over_eps": least, "eps": schedule.eps, "share_below": share},
            )  # fmt: skip


def no_steps(run: xr.DataTree) -> Iterator[Finding]:
    """A schedule of no step was in force."""
    geometry = group(run, "geometry")
    for i, schedule in enumerate(ns_schedules(geometry)):
        own = np.asarray((geometry["ns_schedule"].values == i).any(axis=0))
        if not schedule.coefficients and own.any():
            yield Finding(
                "no_ns_steps", "error", f"{count(own)} not orthogonalised: zero Newton–Schulz steps.",
                "Set ns_steps to at least 3.", names(geometry, own), {"matrices": own.sum()},
            )  # fmt: skip


def not_orthogonalised(run: xr.DataTree) -> Iterator[Finding]:
    """The update that arrives has the unequal singular values of the iteration's start rather than those that it should end with.

    Compared is the kurtosis-like D = mean o⁴/(mean o²)², which no scaling of the update changes: 1 for an orthogonal one. Of the achieved
    update it follows from the size a² = mean o² and the residual, D = (ε̃² − 1 + 2a²)/a⁴; found where log D is nearer to that of
    X₀ = M/‖M‖_F than to the predicted one, in more than half of a matrix's records in which these two are a factor of 2 apart. Records with
    a norm near eps, whose X₀ is smaller, are `near_eps`'.
    """
    study, geometry = _sizes_and_geometry(run)
    if not geometry.sizes["step"]:
        return
    start = geometry["ns_residual"].values
    rank = np.minimum(geometry["rows"].values, geometry["cols"].values)
    if start.ndim < 3:
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        of_start = _inequality(start[..., 0], 1 / rank)
        predicted = _inequality(study["residual"].values, 1 + study["under_lifted"].values + study["band"].values)
        achieved = _inequality(geometry["ns_residual_achieved"].values, study["alignment"].values ** 2)
        told = np.isfinite(achieved) & (of_start > 2 * predicted) & (geometry["fro_norm"].values > NEAR_EPS * _eps_in_force(geometry))
        unequal = told & (achieved > np.sqrt(of_start * predicted))
    concerned = unequal.sum(axis=0) > 0.5 * np.maximum(told.sum(axis=0), 1)
    if concerned.any():
        chosen = unequal & concerned
        numbers = {
            "inequality": float(np.median(achieved[chosen])),
            "of_start": float(np.median(of_start[chosen])),
            "predicted": float(np.median(predicted[chosen])),
        }
        yield Finding(
            "not_orthogonalised", "error",
            f"The updates of {count(concerned)} are not orthogonalised although the optimizer's settings say so: how unequal their singular values "
            f"are (mean o⁴ over squared mean o²: {numbers['inequality']:.2f}) is nearer to what the iteration starts from "
            f"({numbers['of_start']:.2f}) than to what it should end with ({numbers['predicted']:.2f}).",
            "Check that the iteration runs, and that its result is what is applied.", names(geometry, concerned), numbers,
        )  # fmt: skip


def not_aligned(run: xr.DataTree) -> Iterator[Finding]:
    """⟨M, O⟩/‖M‖_* over the RMS of O's singular values, 1 for the polar factor of M whatever its scale, is under 0.5 in the median record.

    What bfloat16 takes off it at κ = 10⁴ is under 0.2.
    """
    study, geometry = _sizes_and_geometry(run)
    if not geometry.sizes["step"]:
        return
    size = study["alignment"].values
    cosine = typical(geometry["alignment"].values / np.where(size > 0, size, np.nan))
    away = cosine < ALIGNED
    if away.any():
        yield Finding(
            "not_aligned", "error",
            f"The updates of {count(away)} point elsewhere than their momentum orthogonalised: cosine {np.median(cosine[away]):.2f}, 1 is meant.",
            "Check the sign of the update, transposes, and that it is made of this step's momentum.", names(geometry, away),
            {"cosine": float(np.median(cosine[away]))},
        )  # fmt: skip


def _sizes_and_geometry(run: xr.DataTree) -> tuple[xr.Dataset, xr.Dataset]:
    """`alignment` and the geometry, at the records and of the matrices that both have; no records where one was not recorded."""
    study, geometry = alignment(run), group(run, "geometry")
    if not study:
        return study, geometry.isel(step=slice(0))
    _, here, there = np.intersect1d(study["step"].values, geometry["step"].values, return_indices=True)
    _, mine, own = np.intersect1d(study["name"].values, geometry["name"].values, return_indices=True)
    return study.isel(step=here, matrix=mine), geometry.isel(step=there, matrix=own)


def _eps_in_force(geometry: xr.Dataset) -> NDArray[np.float64]:
    """eps of every record's schedule, 0 without one; (step, matrix)."""
    eps = np.array([schedule.eps for schedule in ns_schedules(geometry)] + [0.0])  # the index of no schedule is −1
    found: NDArray[np.float64] = eps[geometry["ns_schedule"].values]
    return found


def _inequality(residual: ArrayLike, mean_square: ArrayLike) -> NDArray[np.float64]:
    """mean o⁴/(mean o²)² from ε̃ = √(mean (1 − o²)²) and mean o²."""
    residual, square = np.asarray(residual, dtype=np.float64), np.asarray(mean_square, dtype=np.float64)
    return np.asarray((residual**2 - 1 + 2 * square) / square**2)


RULES = (no_steps, near_eps, not_orthogonalised, not_aligned, zero_input, single_row, condition_bounded)
