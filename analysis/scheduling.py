"""From recorded geometry to a Newton–Schulz schedule per operator (AMO: observe, then commit)."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import xarray as xr

from ..diagnostics.newton_schulz import ns_flops
from ..diagnostics.schedule import OperatorSchedule, Schedule
from ..diagnostics.spectrum import BFLOAT16_ROUNDOFF, precision_floor
from ..diagnostics.spectrum_sketch import unsketch
from .allocation import RULES, Allocation, Problem, lower_bound, problem, uniform
from .run import orthogonalised, own_residual, records
from .studies import residual_curves

# Momentum of 0.95 forgets its zero start in about this many steps.
BURN_IN = 20
SNAPSHOTS = 8
WINDOW_SHARE = 0.01


def default_window(run: xr.DataTree) -> slice:
    """From the end of learning-rate warm-up (and of the momentum's first 20 steps), 1 % of the steps and at least 8 records.

    Fewer records where the run has no more.
    """
    geometry = orthogonalised(run)
    steps = geometry["step"].values
    start = min(BURN_IN, int(steps[-1]))
    if "update" in run.children and run["update"].sizes.get("step"):
        update = records(run, "update")
        # Of the orthogonalised matrices only: another optimizer may warm up differently, or not at all.
        largest = update["lr"].isel(matrix=np.isin(update["name"].values, geometry["name"].values)).max("matrix").values
        if np.isfinite(largest).any():
            start = max(start, int(update["step"].values[np.nanargmax(largest >= 0.99 * np.nanmax(largest))]))
    inside = steps[steps >= start]
    if not len(inside):
        return slice(int(steps[0]), int(steps[-1]))
    last = max(int(inside[0] + WINDOW_SHARE * steps[-1]), int(inside[min(SNAPSHOTS, len(inside)) - 1]))
    return slice(int(inside[0]), last)


def derive_schedule(
    run: xr.DataTree, *, budget: int = 5, rule: str = "mean", family: str = "matched", window: slice | None = None
) -> Schedule:
    """Steps and coefficients per operator that use a budget of `budget` steps for all better than all-equal steps do.

    The budget is in FLOPs: operators of large matrices pay more per step. Weights are shares of matrices.

    Args:
        run: as from `open_run`.
        budget: step count of the uniform baseline, 3 to 8; the schedule costs no more than it.
        rule: "mean" (least mean residual, no operator worse than the baseline's worst), "mean-uncapped", "minimax",
            "uniform".
        family: "matched" (one design per step count), "jordan" or "polar_express" (the first steps of the list).
        window: steps to average over, both ends included; by default :func:`default_window`.

    Raises:
        ValueError: an argument out of range, nothing orthogonalised in the run, or no record in the window.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if family not in residual_curves.SCHEDULES:
        raise ValueError(f"family: expected one of {', '.join(residual_curves.SCHEDULES)}, got {family!r}")
    if budget not in residual_curves.STEPS:
        raise ValueError(f"budget: expected a step count of {residual_curves.STEPS[0]} to {residual_curves.STEPS[-1]}, got {budget}")
    window = default_window(run) if window is None else window
    curves = residual_curves.study(run, window, (family,))
    operators = [str(o) for o in curves["operator"].values]
    geometry = orthogonalised(run)
    names = {o: tuple(str(n) for n in geometry["name"].values[geometry["operator"].values == o]) for o in operators}
    cost = step_costs(geometry, operators)
    given = problem(curves["residual"].values[0], residual_curves.STEPS, cost, [len(names[o]) for o in operators], budget)
    found, baseline = RULES[rule](given), uniform(given)
    entries = {
        o: OperatorSchedule(
            coefficients=residual_curves.SCHEDULES[family](k),
            matrices=names[o],
            predicted_residual=_residual(given, g, k),
            baseline_residual=_residual(given, g, budget),
            cost=cost[g] * k,
        )
        for g, (o, k) in enumerate(zip(operators, found.steps, strict=True))
    }
    return Schedule(
        operators=entries,
        budget={"kind": "flop", "mean_steps": budget, "limit": given.budget, "cost": found.cost},
        objective={
            "in_force_mean_residual": float(np.nanmean(own_residual(geometry.sel(step=window)).values)),
            **_objective(given, rule, found, baseline),
        },
        provenance={
            "run": run.encoding.get("source"),
            "run_created": run.attrs.get("created"),
            "window": [curves.attrs["first_step"], curves.attrs["last_step"]],
            "snapshots": int(curves["snapshots"]),
            "family": family,
            "below_bfloat16_floor": _below_bfloat16_floor(geometry.sel(step=window), operators),
            "residual": "Gram residual ‖I − OOᵀ‖_F/√r predicted in float64 from the stored singular values",
            "optiscope": version("optiscope"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def step_costs(geometry: xr.Dataset, operators: Sequence[str]) -> list[int]:
    """FLOPs of one Newton–Schulz step over all matrices of each operator."""
    shapes = list(zip(geometry["operator"].values, geometry["rows"].values, geometry["cols"].values, strict=True))
    return [sum(ns_flops(int(m), int(n)) for o, m, n in shapes if o == own) for own in operators]


def _below_bfloat16_floor(geometry: xr.Dataset, operators: list[str]) -> dict[str, float]:
    """Share of each operator's singular values under bfloat16's rounding noise: steps spent on them orthogonalise that noise."""
    shares: dict[str, list[float]] = {o: [] for o in operators}
    shapes = zip(geometry["operator"].values, geometry["rows"].values, geometry["cols"].values, strict=True)
    for j, (operator, rows, cols) in enumerate(shapes):
        if operator in shares:
            x = unsketch(geometry["sigma_quantile"].values[:, j], int(min(rows, cols)))
            seen = np.isfinite(x).all(axis=-1)
            shares[operator] += (x[seen] < precision_floor(int(rows), int(cols), BFLOAT16_ROUNDOFF)).mean(axis=-1).tolist()
    return {operator: float(np.mean(values)) for operator, values in shares.items()}


def _residual(given: Problem, group: int, steps: int) -> float:
    return float(given.residual[group, given.steps.index(steps)])


def _objective(given: Problem, rule: str, found: Allocation, baseline: Allocation) -> dict[str, str | float | None]:
    bounded = {"mean": True, "mean-uncapped": False}
    return {
        "rule": rule,
        "mean_residual": found.mean_residual,
        "max_residual": found.max_residual,
        "baseline_mean_residual": baseline.mean_residual,
        "baseline_max_residual": baseline.max_residual,
        "lower_bound": lower_bound(given, capped=bounded[rule]) if rule in bounded else None,
    }
