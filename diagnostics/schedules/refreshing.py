"""Does a committed schedule still earn what it promised, and when does another take its place?

Retained gain, not the order of the operators, is what tells: where several operators tie their order changes without loss.
A new schedule takes over only when two refreshes in a row find that it improves the mean residual by 2 % or more, and then
moves by one step per operator at most, within the same budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..newton_schulz.recorded_spectra import RecordedSpectra
from .allocation import RULES, Problem, evaluate, least_mean, uniform
from .deriving import SCHEDULES, STEPS, evidence_of, few_records, schedule_of
from .evidence import Evidence
from .schedule_file import Schedule

# What a schedule must take off the mean residual to be worth another one, and how many refreshes in a row must find so.
IMPROVEMENT = 0.02
AGREEING = 2
# A possible gain under this share of J is nothing that could be retained.
SMALL = 1e-3
# Retained gain under which a schedule should be looked at before its next refresh is due.
EARLY = 0.5

NOTHING = float("nan")


@dataclass(frozen=True)
class Refresh:
    """What a look at a new window came to.

    Attributes:
        schedule: to be in force from here on; the current one itself unless `adopted`.
        adopted: whether it is another one.
        improvement: 1 − J(found)/J(current), predicted in the window, of the best schedule within one step per operator; NaN where the
            window holds no spectrum of some operator, and nothing can be said.
        state: to be passed to the next refresh; plain data.
    """

    schedule: Schedule
    adopted: bool
    improvement: float
    state: dict[str, int]


def retained(given: Problem, steps: tuple[int, ...], *, capped: bool = False) -> tuple[float, float, float]:
    """ρ = [J(uniform) − J(steps)]/[J(uniform) − J(oracle)], and both gains as shares of J(uniform).

    The oracle is the exact optimum of `given`, by default without the cap that protects the worst operator: steps that were committed
    obey the cap of their own window. ρ is then at most 1. It is NaN where less than 0.1 % could be gained.
    """
    baseline = uniform(given).mean_residual
    gain = 1 - evaluate(given, steps).mean_residual / baseline
    possible = 1 - least_mean(given, capped=capped).mean_residual / baseline
    return (gain / possible if possible > SMALL else NOTHING), gain, possible


def retained_gain(record: RecordedSpectra, schedule: Schedule) -> tuple[float, float, float]:
    """(ρ, gain, oracle gain) of a schedule at a later record, or over several; NaN where some operator of it has no spectrum there.

    The oracle has a cap where the rule of the schedule has one, so that ρ starts near 1; where the schedule breaks the cap of the record
    ρ may exceed 1.

    Raises:
        ValueError: a schedule that :func:`schedule_from_spectra` did not write.
    """
    evidence = _evidence(record, schedule)
    if evidence is None:
        return NOTHING, NOTHING, NOTHING
    return retained(evidence.problem, _steps(schedule), capped=schedule.objective.get("rule") != "mean-uncapped")


def next_schedule(
    current: Schedule, window: RecordedSpectra, state: Mapping[str, int] | None = None, *, provenance: Mapping[str, Any] | None = None
) -> Refresh:
    """The schedule that is in force after a look at a new window: by the rule, family, budget and operators of `current`.

    Args:
        current: what is in force, as :func:`schedule_from_spectra` or this function gave it.
        window: the records to look at; matrices that `current` does not name are left out.
        state: of the refresh before; None for the first one.
        provenance: kept in a new schedule, over that of `current`.

    Raises:
        ValueError: a schedule that :func:`schedule_from_spectra` did not write.
    """
    evidence = _evidence(window, current)
    if evidence is None:
        return Refresh(current, False, NOTHING, {"agreeing": 0})
    given = replace(evidence.problem, current=_steps(current))
    rule = str(current.objective["rule"])
    before, found = evaluate(given, _steps(current)), RULES[rule](given)
    # What the rule minimises: the largest residual, or the mean.
    was, would = (a.max_residual if rule == "minimax" else a.mean_residual for a in (before, found))
    improvement = 1 - would / was if was > 0 else 0.0
    agreeing = (state or {}).get("agreeing", 0) + 1 if improvement >= IMPROVEMENT else 0
    if agreeing < AGREEING:
        return Refresh(current, False, improvement, {"agreeing": agreeing})
    kept = {name: current.provenance[name] for name in ("run", "run_created", "depth") if name in current.provenance}
    return Refresh(schedule_of(evidence, found, rule, {**kept, **(provenance or {})}), True, improvement, {"agreeing": 0})


def _steps(schedule: Schedule) -> tuple[int, ...]:
    return tuple(entry.steps for entry in schedule.operators.values())


def _evidence(window: RecordedSpectra, schedule: Schedule) -> Evidence | None:
    """What a window says about the operators of a schedule; None where it holds no spectrum of some of them."""
    family, rule, budget = str(schedule.provenance.get("family")), schedule.objective.get("rule"), schedule.budget.get("mean_steps")
    entries = schedule.operators
    if (
        family not in SCHEDULES
        or rule not in RULES
        or budget not in STEPS
        or any(e.steps not in STEPS or e.cost < 1 for e in entries.values())
    ):
        raise ValueError(
            f"schedule: expected one that `schedule_from_spectra` or `diag schedule` derived, with {STEPS[0]} to {STEPS[-1]} steps per operator; "
            f"got family {family!r}, rule {rule!r}, budget {budget!r}"
        )
    spectra = few_records(window)
    operator_of = {name: o for o, entry in entries.items() for name in entry.matrices}
    known = np.array([name in operator_of for name in spectra.name.tolist()], dtype=bool)
    spectra = spectra.of_matrices(known & spectra.seen)
    own = [operator_of[name] for name in spectra.name.tolist()]
    if set(own) != set(entries):
        return None
    return evidence_of(
        spectra,
        {o: np.array(own) == o for o in entries},
        {o: entry.matrices for o, entry in entries.items()},
        [entry.cost // entry.steps for entry in entries.values()],
        budget=budget,
        family=family,
        recoverable=bool(schedule.objective.get("recoverable", False)),
    )
