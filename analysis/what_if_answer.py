"""What a table of `what_if` comes to: the family and number of steps that would have left least, at what cost, and what was in force left."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr

from .what_if import PRECISIONS, STEPS, hazardous

Rule = Literal["mean", "minimax"]
WHAT = {"mean": "smallest mean residual", "minimax": "smallest residual of the worst operator"}
ROUNDING = 1e-9  # of sums of FLOPs


@dataclass(frozen=True)
class Answer:
    """The best of a table within a cost.

    Attributes:
        family, steps: None and 0 where none is within the cost.
        residuals: what it would leave, in float64 and as bfloat16 would have it; over the values that bfloat16 carries the first alone.
        in_force: what the schedule in force left: predicted as `residuals`, then as read back from the updates; NaN where not recorded.
        cost, limit: FLOPs relative to five quintic steps for all: of the best, and the most that it may take.
    """

    family: str | None
    steps: int
    residuals: tuple[float, ...]
    in_force: tuple[float, ...]
    cost: float
    limit: float


def judged(dataset: xr.Dataset, rule: Rule = "mean", *, recoverable: bool = False) -> xr.DataArray:
    """What a choice is made by, (family, k): as bfloat16 has it, or with `recoverable` exactly, over the values above bfloat16's noise alone."""
    return _by(dataset, rule, PRECISIONS[-1], recoverable)


def best(dataset: xr.Dataset, budget: int | None = None, rule: Rule = "mean", *, recoverable: bool = False) -> Answer:
    """The family and number of steps that leave least, none of those with hazards; of equal ones the cheaper.

    Args:
        dataset: as from `what_if`.
        budget: quintic steps for all whose FLOPs may be spent; by default what the schedule in force took, or 5 where that was not recorded.
        rule: "mean", the least mean residual over all matrices, or "minimax", the least largest residual of an operator.
        recoverable: as in :func:`judged`.

    Raises:
        ValueError: a budget or a rule that is not on offer.
    """
    if budget is not None and budget not in STEPS:
        raise ValueError(f"budget: expected a step count of {STEPS[0]} to {STEPS[-1]}, got {budget}")
    if rule not in WHAT:
        raise ValueError(f"rule: expected one of {', '.join(WHAT)}, got {rule!r}")
    cost_in_force = float(dataset["in_force_relative_cost"])
    limit = budget / 5 if budget is not None else cost_in_force if np.isfinite(cost_in_force) else 1.0
    values, costs = judged(dataset, rule, recoverable=recoverable), dataset["relative_cost"]
    unsafe = set(hazardous(dataset))
    left = sorted(
        (value, cost, i, j)
        for i, family in enumerate(dataset["family"].values.tolist())
        for j, (value, cost) in enumerate(zip(values.values[i].tolist(), costs.values[i].tolist(), strict=True))
        if family not in unsafe and np.isfinite(value) and cost <= limit * (1 + ROUNDING)
    )
    in_force = _in_force(dataset, rule, recoverable)
    if not left:
        return Answer(None, 0, (), in_force, float("nan"), limit)
    _, cost, i, j = left[0]
    precisions = PRECISIONS[:1] if recoverable else PRECISIONS
    residuals = tuple(float(_by(dataset, rule, precision, recoverable).values[i, j]) for precision in precisions)
    return Answer(str(dataset["family"].values[i]), int(dataset["k"].values[j]), residuals, in_force, cost, limit)


def summary(dataset: xr.Dataset, budget: int | None = None, rule: Rule = "mean", *, recoverable: bool = False) -> str:
    """The result in a sentence; arguments as of :func:`best`."""
    found = best(dataset, budget, rule, recoverable=recoverable)
    name = str(dataset.attrs["in_force"])
    in_force = f"what is in force ({name})" if name else "what is in force"
    spent = in_force if name and budget is None else f"{round(found.limit * 5)} quintic steps for all"
    if found.family is None:
        would = f"no family of the table that is safe to use takes as few FLOPs as {spent}"
    else:
        share = "" if abs(found.cost / found.limit - 1) < 5e-3 else f"{found.cost / found.limit:.0%} of "
        what = WHAT[rule] + (" above bfloat16's noise" if recoverable else "")
        would = f"{found.steps} steps of '{found.family}' would leave the {what} for {share}the FLOPs of {spent}, {_told(found.residuals)}"
    *predicted, achieved = found.in_force
    who = "that" if found.family is not None and spent == in_force else in_force
    if not np.isfinite(predicted[0]):
        return f"{would}; what is in force left was not recorded"
    if not np.isfinite(achieved):
        return f"{would}; {who} would leave {_told(tuple(predicted))}"
    return f"{would}; {who} left {achieved:.3f}, predicted {_told(tuple(predicted))}"


def why_not_scheduled(dataset: xr.Dataset, found: Answer) -> str | None:
    """Why `diag schedule` takes other coefficients than the best here; None where it takes the same."""
    if found.family in (None, "matched"):
        return None
    here = ""
    if "matched" in dataset["family"].values:
        left = float(dataset["mean_residual"].sel(family="matched", k=found.steps, precision="bfloat16"))
        here = f" ({found.steps} for all would leave a mean residual of {left:.3f})"
    return (
        f"diag schedule takes 'matched', which is designed anew for each number of steps{here}, because it gives operators different numbers; "
        f"'{found.family}' is one list, cut short, or its last triple held, at other numbers than its own. --family {found.family} takes it all the same"
    )


def plain(found: Answer) -> dict[str, Any]:
    """As values of JSON, NaN being null."""
    *predicted, achieved = found.in_force
    values = {
        "family": found.family, "steps": found.steps or None, "relative_cost": found.cost, "relative_cost_limit": found.limit,
        **dict(zip(("residual_float64", "residual_bfloat16"), found.residuals, strict=False)),
        **dict(zip(("in_force_float64", "in_force_bfloat16"), predicted, strict=False)), "in_force_achieved": achieved,
    }  # fmt: skip
    return {name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in values.items()}


def _by(dataset: xr.Dataset, rule: Rule, precision: str, recoverable: bool) -> xr.DataArray:
    if rule == "mean":
        return dataset["mean_residual_recoverable"] if recoverable else dataset["mean_residual"].sel(precision=precision)
    return (dataset["residual_recoverable"] if recoverable else dataset["residual"].sel(precision=precision)).max("operator", skipna=False)


def _in_force(dataset: xr.Dataset, rule: Rule, recoverable: bool) -> tuple[float, ...]:
    """What it left, predicted (in float64, and as bfloat16 would have it) and read back; over the values above the noise nothing is read back."""
    if recoverable:
        return _over_operators(dataset["in_force_residual_recoverable"], dataset, rule), float("nan")
    predicted = [dataset["in_force_residual"].sel(precision=precision) for precision in PRECISIONS]
    return tuple(_over_operators(values, dataset, rule) for values in (*predicted, dataset["achieved_residual"]))


def _over_operators(values: xr.DataArray, dataset: xr.Dataset, rule: Rule) -> float:
    known = np.isfinite(values.values)
    if not known.any():
        return float("nan")
    return (
        float(values.values[known].max())
        if rule == "minimax"
        else float(np.average(values.values[known], weights=dataset["matrices"].values[known]))
    )


def _told(residuals: tuple[float, ...]) -> str:
    """One number, or that of bfloat16 and the exact one."""
    exact, *low = residuals
    return f"{low[0]:.3f} in bfloat16 ({exact:.3f} exactly)" if low else f"{exact:.3f} (exactly)"
