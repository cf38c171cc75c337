"""Whether Newton–Schulz steps given out by operator would do better than equal ones."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from ...diagnostics.finding import Finding
from ...diagnostics.schedules.deriving import STEPS
from ...diagnostics.schedules.refreshing import IMPROVEMENT
from ..in_parts import windows
from ..run import ns_schedules
from ..scheduling import derive_schedule
from .matrices import group


def steps_by_operator(run: xr.DataTree) -> Iterator[Finding]:
    """At equal FLOPs, steps by operator surely lower the predicted mean residual, by 2 % or more (`analysis.derive_schedule`)."""
    geometry = group(run, "geometry")
    counts = [len(s.coefficients) for i, s in enumerate(ns_schedules(geometry)) if (geometry["ns_schedule"].values == i).any()]
    if not counts or not all(_any_finite(geometry[name].variable) for name in ("ns_residual", "sigma_quantile")):
        return
    budget = int(np.clip(max(counts), STEPS[0], STEPS[-1]))
    whole = {name: dataset for name in ("geometry", "update") if (dataset := group(run, name)).sizes["step"]}
    try:
        found = derive_schedule(xr.DataTree.from_dict(whole), budget=budget)
    except ValueError:
        return  # nothing orthogonalised, or no spectrum
    before, after = (found.objective[name] for name in ("baseline_mean_residual", "mean_residual"))
    in_force = found.objective["in_force_mean_residual"]
    if not (isinstance(before, float) and isinstance(after, float) and before > 0) or 1 - after / before < IMPROVEMENT:
        return
    more = {o: entry for o, entry in found.operators.items() if entry.steps > budget}
    steps = ", ".join(f"{o} {entry.steps}" for o, entry in found.operators.items())
    yield Finding(
        "steps_by_operator", "info",
        f"At the FLOPs of {budget} steps for all, steps by operator ({steps}) lower the predicted mean residual from {before:.3f} to {after:.3f}: "
        "more where a step does more, or costs less.",
        "Derive a schedule (diag schedule) and apply it (apply_schedule); whether the loss gains by it, a training must tell.",
        tuple(name for entry in more.values() for name in entry.matrices),
        {"uniform": before, "scheduled": after, "gain": 1 - after / before, "budget": budget}
        | ({"in_force": in_force} if isinstance(in_force, float) else {}),
    )  # fmt: skip


def _any_finite(variable: xr.Variable) -> bool:
    return any(np.isfinite(variable[window].values).any() for window in windows(variable))


RULES = (steps_by_operator,)
