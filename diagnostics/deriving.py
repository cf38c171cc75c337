"""From recorded spectra to a Newton–Schulz schedule per operator (AMO: observe, then commit).

The same for a run that is read from disk and for one that goes on: what is committed live is what would be derived afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .allocation import RULES, Allocation, Problem, lower_bound, problem, uniform
from .evenly_spread import evenly_spread
from .newton_schulz import ns_flops
from .ns_families import FAMILIES, Coefficients, repeat_last
from .operators import ordered
from .polar_express import MATCHED_LOWER_BOUND, matched_coefficients
from .recorded_spectra import RecordedSpectra
from .schedule import OperatorSchedule, Schedule
from .window_residuals import WindowResiduals, window_residuals

Floats = NDArray[np.float64]

# Records of a window that are averaged over at most, evenly spread: each spectrum is mapped anew.
RECORDS = 32

STEPS = tuple(sorted(MATCHED_LOWER_BOUND))

# Family name → coefficients of a schedule of k steps.
SCHEDULES: Mapping[str, Callable[[int], Coefficients]] = {
    "matched": matched_coefficients,
    "jordan": lambda k: repeat_last(FAMILIES["jordan"].coefficients, k),
    "polar_express": lambda k: repeat_last(FAMILIES["polar_express"].coefficients, k),
}


def check_choices(budget: int, rule: str, family: str) -> None:
    """Raise ValueError where one of them is not on offer."""
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if family not in SCHEDULES:
        raise ValueError(f"family: expected one of {', '.join(SCHEDULES)}, got {family!r}")
    if budget not in STEPS:
        raise ValueError(f"budget: expected a step count of {STEPS[0]} to {STEPS[-1]}, got {budget}")


def schedule_from_spectra(
    window: RecordedSpectra,
    *,
    budget: int = 5,
    rule: str = "mean",
    family: str = "matched",
    recoverable: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Schedule:
    """Steps and coefficients per operator that use a budget of `budget` steps for all better than all-equal steps do.

    The budget is in FLOPs: operators of large matrices pay more per step. Weights are shares of matrices.

    Args:
        window: the records to average over; of more than 32, as many evenly spread ones.
        budget: step count of the uniform baseline, 3 to 8; the schedule costs no more than it.
        rule: "mean" (least mean residual, no operator worse than the baseline's worst), "mean-uncapped", "minimax", "uniform".
        family: "matched" (one design per step count), "jordan" or "polar_express" (the first steps of the list).
        recoverable: residuals over the singular values above bfloat16's rounding noise alone.
        provenance: where the spectra come from, kept in the schedule.

    Raises:
        ValueError: a choice that is not on offer, or no spectrum in the window.
    """
    check_choices(budget, rule, family)
    spectra = few_records(window)
    if not spectra.seen.any():
        raise ValueError("window: no spectrum recorded in it; let it hold at least one record of an optimizer that orthogonalises")
    spectra = spectra.of_matrices(spectra.seen)
    members = {o: spectra.operator == o for o in ordered(spectra.operator.tolist())}
    matrices = {o: tuple(str(n) for n in spectra.name[own]) for o, own in members.items()}
    cost = step_costs(spectra.operator, spectra.rows, spectra.cols, list(members))
    evidence = evidence_of(spectra, members, matrices, cost, budget=budget, family=family, recoverable=recoverable)
    return schedule_of(evidence, RULES[rule](evidence.given), rule, provenance or {})


@dataclass(frozen=True)
class Evidence:
    """What a window says about every operator: all that a schedule for it is chosen by.

    Attributes:
        spectra: of the matrices that were seen.
        members: operator → which of those matrices are its own, shape (matrices,).
        matrices: operator → the names of all its matrices, seen or not.
        seen: what each schedule on offer leaves of each spectrum.
        given: the operators' mean residuals, costs and weights.
        family, recoverable: whose coefficients, and over which singular values the residuals are.
    """

    spectra: RecordedSpectra
    members: Mapping[str, NDArray[np.bool_]]
    matrices: Mapping[str, tuple[str, ...]]
    seen: WindowResiduals
    given: Problem
    family: str
    recoverable: bool


def few_records(window: RecordedSpectra) -> RecordedSpectra:
    """At most 32 of its records, evenly spread."""
    return window.of_records(evenly_spread(len(window.step), RECORDS))


def evidence_of(
    spectra: RecordedSpectra,
    members: Mapping[str, NDArray[np.bool_]],
    matrices: Mapping[str, tuple[str, ...]],
    cost: Sequence[int],
    *,
    budget: int,
    family: str,
    recoverable: bool,
) -> Evidence:
    """The allocation problem that the spectra of a window pose; `cost` is of one step of each operator, weights are counts of matrices."""
    seen = window_residuals(spectra, [SCHEDULES[family](k) for k in STEPS])
    residual = seen.residual(recoverable=recoverable)
    curves = np.stack([mean_residuals(residual, own) for own in members.values()])
    given = problem(curves, STEPS, cost, [len(matrices[o]) for o in members], budget)
    return Evidence(spectra, members, matrices, seen, given, family, recoverable)


def schedule_of(evidence: Evidence, found: Allocation, rule: str, provenance: Mapping[str, Any]) -> Schedule:
    """The schedule that holds the steps `found`."""
    given, spectra = evidence.given, evidence.spectra
    entries = {
        o: OperatorSchedule(
            coefficients=SCHEDULES[evidence.family](k),
            matrices=evidence.matrices[o],
            predicted_residual=_residual(given, g, k),
            baseline_residual=_residual(given, g, given.baseline),
            cost=int(given.cost[g]) * k,
        )
        for g, (o, k) in enumerate(zip(evidence.members, found.steps, strict=True))
    }
    return Schedule(
        operators=entries,
        budget={"kind": "flop", "mean_steps": given.baseline, "limit": given.budget, "cost": found.cost},
        objective={
            "in_force_mean_residual": _mean(spectra.in_force),
            "recoverable": evidence.recoverable,
            **_objective(given, rule, found, uniform(given)),
        },
        provenance={
            **provenance,
            "window": [int(spectra.step[0]), int(spectra.step[-1])],
            "snapshots": len(spectra.step),
            "family": evidence.family,
            "below_bfloat16_floor": {o: _mean(1 - evidence.seen.recoverable[:, own]) for o, own in evidence.members.items()},
            "residual": "Gram residual ‖I − OOᵀ‖_F/√r predicted in float64 from the stored singular values"
            + (" above bfloat16's rounding noise" if evidence.recoverable else ""),
            "optiscope": version("optiscope"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def mean_residuals(residual: Floats, own: NDArray[np.bool_]) -> Floats:
    """R_g under each schedule: the mean over the operator's matrices and all records; `residual` (schedule, record, matrix)."""
    known = np.isfinite(residual[:, :, own])
    total, count = np.where(known, residual[:, :, own], 0).sum(axis=1), known.sum(axis=1)
    return np.asarray(total.sum(axis=1) / count.sum(axis=1))


def step_costs(operator: NDArray[Any], rows: NDArray[Any], cols: NDArray[Any], operators: Sequence[str]) -> list[int]:
    """FLOPs of one Newton–Schulz step over all matrices of each operator; the arrays of shape (matrices,)."""
    shapes = list(zip(operator, rows, cols, strict=True))
    return [sum(ns_flops(int(m), int(n)) for o, m, n in shapes if o == own) for own in operators]


def _mean(values: Floats) -> float:
    known = np.isfinite(values)
    return float(values[known].mean()) if known.any() else float("nan")


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
