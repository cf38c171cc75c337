"""Whether the Newton–Schulz iteration gets an input it can orthogonalise, and does so."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from ..run import ns_schedules
from .finding import Finding, count, group, names

NEAR_EPS = 1e3  # ‖M‖_F/eps under which scale invariance is at risk: X₀ = M/max(‖M‖_F, eps) loses it at 1


def single_row(run: xr.DataTree) -> Iterator[Finding]:
    """A matrix with one singular value."""
    geometry = group(run, "geometry")
    single = np.minimum(geometry["rows"].values, geometry["cols"].values) == 1
    if single.any():
        yield Finding(
            "single_row", "info", f"{count(single)} with a single row or column: one singular value, κ = 1 by definition.",
            "Leave them to AdamW; orthogonalising a vector only normalises it.", names(geometry, single),
        )  # fmt: skip


def zero_input(run: xr.DataTree) -> Iterator[Finding]:
    """An NS input of norm zero."""
    geometry = group(run, "geometry")
    zeros = geometry["fro_norm"].values == 0
    if zeros.any():
        zero = zeros.any(axis=0)
        yield Finding(
            "zero_input", "warning", f"The NS input (or momentum) of {count(zero)} was all zeros in some record; it has no spectrum.",
            "Check that these matrices receive gradients.", names(geometry, zero), {"records": zeros.sum()},
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
    """‖M‖_F under 1,000 times the eps that it is divided with: X₀ = M/max(‖M‖_F, eps) and M/(‖M‖_F + eps) are then not scale-free."""
    geometry = group(run, "geometry")
    for i, schedule in enumerate(ns_schedules(geometry)):
        if schedule.scaling != "frobenius":
            continue  # its eps bounds something else than ‖M‖_F
        ratio = geometry["fro_norm"].where(geometry["ns_schedule"] == i).values / schedule.eps if schedule.eps else np.array([np.inf])
        small = (ratio > 0) & (ratio < NEAR_EPS)
        if small.any():
            least = float(ratio[small].min())
            yield Finding(
                "norm_near_eps", "warning",
                f"‖M‖_F falls to {least:.3g} times the optimizer's eps ({schedule.eps:g}); below eps the update shrinks with it.",
                "Lower eps (1e-15 is safe in float32), or scale the loss.", names(geometry, small.any(axis=0)),
                {"norm_over_eps": least, "eps": schedule.eps},
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


RULES = (no_steps, near_eps, zero_input, single_row, condition_bounded)
