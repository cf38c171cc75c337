"""From recorded spectra to a Newton–Schulz schedule per operator (AMO: observe, then commit).

The same for a run that is read from disk and for one that goes on: what is committed live is what would be derived afterwards.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import compress
from math import log10, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evenly_spread import evenly_spread
from ..newton_schulz.coefficients import SCHEDULE_FAMILIES, coefficients_of
from ..newton_schulz.families import Coefficients
from ..newton_schulz.polar_express import MATCHED_LOWER_BOUND
from ..newton_schulz.recorded_spectra import RecordedSpectra, window_residuals
from ..newton_schulz.spectral_map import ns_flops
from ..spectra.spectrum import BFLOAT16_ROUNDOFF, precision_floor
from ..spectra.spectrum_sketch import TINY
from .allocation import RULES, Allocation, Problem, few_enough, problem, uniform
from .depth_halves import depth_halves
from .evidence import Evidence, count_layers, gain_intervals, known_mean, predicted_gain
from .schedule_file import OperatorSchedule, Schedule

Floats = NDArray[np.float64]

# Records of a window that are averaged over at most, evenly spread: each spectrum is mapped anew.
RECORDS = 32

STEPS = tuple(sorted(MATCHED_LOWER_BOUND))

# Family name → coefficients of a schedule of k steps.
SCHEDULES: Mapping[str, Callable[[int], Coefficients]] = {name: partial(coefficients_of, name) for name in SCHEDULE_FAMILIES}

SPLITS = ("auto", "never")

# Singular values are stored in this precision, and momenta held in it or a coarser one: a κ beyond its noise is none.
FLOAT32_ROUNDOFF = 2.0**-24


def check_choices(budget: int, rule: str, family: str, split: str = "auto") -> None:
    """Raise ValueError where one of them is not on offer."""
    for name, value, offered in (("rule", rule, RULES), ("family", family, SCHEDULES), ("split", split, SPLITS)):
        if value not in offered:
            raise ValueError(f"{name}: expected one of {', '.join(offered)}, got {value!r}")
    if budget not in STEPS:
        raise ValueError(f"budget: expected a step count of {STEPS[0]} to {STEPS[-1]}, got {budget}")


def schedule_from_spectra(
    window: RecordedSpectra,
    *,
    budget: int = 5,
    rule: str = "mean",
    family: str = "matched",
    recoverable: bool = False,
    split: str = "auto",
    keep_uniform: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> Schedule:
    """Steps and coefficients per operator that use a budget of `budget` steps for all better than all-equal steps do.

    The budget is in FLOPs: operators of large matrices pay more per step. Weights are shares of matrices.

    Args:
        window: the records to average over; of more than 32, as many evenly spread ones.
        budget: step count of the uniform baseline, 3 to 8; the schedule costs no more than it.
        rule: "mean" (least mean residual, no operator worse than the baseline's worst), "mean-uncapped", "minimax", "uniform", or "kappa" (from
            the condition numbers and stable ranks alone).
        family: "matched" (one design per step count), or another of `SCHEDULES` (the first steps of its list, the last held).
        recoverable: residuals over the singular values above bfloat16's rounding noise alone. What lies below is noise in an optimizer that
            iterates in bfloat16; it counts by default, as it does in every recorded residual.
        split: "auto" cuts an operator in two by depth where the halves of its layers differ more than operators do; "never" does not.
        keep_uniform: hold equal steps for all where the 95 % interval of the gain over layers includes zero.
        provenance: where the spectra come from, kept in the schedule.

    Raises:
        ValueError: a choice that is not on offer, or no spectrum in the window.
    """
    check_choices(budget, rule, family, split)
    spectra = few_records(window)
    if not spectra.seen.any():
        raise ValueError("window: no spectrum recorded in it; let it hold at least one record of an optimizer that orthogonalises")
    spectra = spectra.of_matrices(spectra.seen)
    few_enough(len(set(spectra.operator.tolist())))  # before all of them are looked at
    small, large = _log_smallest(spectra, FLOAT32_ROUNDOFF), np.log10(np.maximum(spectra.stored[..., -1], TINY))
    log_kappa = np.array([known_mean(values) for values in (large - small).T])
    cut = split == "auto" and rule != "uniform"
    members, tested = depth_halves(spectra.operator, spectra.layer, log_kappa, cut=cut)
    matrices = {o: tuple(str(n) for n in spectra.name[own]) for o, own in members.items()}
    cost = step_costs(spectra.rows, spectra.cols, members.values(), cubic=is_cubic(family))
    evidence = evidence_of(spectra, members, matrices, cost, budget=budget, family=family, recoverable=recoverable)
    depth = {"split": split, "variances": tested}
    return schedule_of(evidence, RULES[rule](evidence.problem), rule, {**(provenance or {}), "depth": depth}, keep_uniform=keep_uniform)


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
    decades = -_log_smallest(spectra, BFLOAT16_ROUNDOFF if recoverable else FLOAT32_ROUNDOFF)
    needed = np.array([known_mean(decades[:, own]) for own in members.values()]) / log10(_slope(family, budget))
    given = problem(curves, STEPS, cost, [len(matrices[o]) for o in members], budget, needed)
    return Evidence(spectra, members, matrices, seen, given, family, recoverable)


def schedule_of(
    evidence: Evidence, choice: Allocation, rule: str, provenance: Mapping[str, Any], *, keep_uniform: bool = False
) -> Schedule:
    """The schedule that holds the steps a rule chose; with `keep_uniform` equal steps where the interval of their gain includes zero."""
    given, spectra, baseline = evidence.problem, evidence.spectra, uniform(evidence.problem)
    residual = evidence.residuals.residual(recoverable=evidence.recoverable)
    before, after = (evidence.under(a.steps, residual) for a in (baseline, choice))
    intervals = gain_intervals(before, after, evidence.members, given.weight, spectra.layer, largest=rule == "minimax")
    kept = keep_uniform and choice.steps != baseline.steps and intervals.gain is not None and intervals.gain[0] <= 0
    held = baseline if kept else choice
    entries = {
        o: OperatorSchedule(
            coefficients=SCHEDULES[evidence.family](k),
            matrices=evidence.matrices[o],
            predicted_residual=_residual(given, g, k),
            baseline_residual=_residual(given, g, given.baseline),
            cost=int(given.cost[g]) * k,
            baseline_interval=intervals.baseline[o],
            shapes=_shapes(spectra, evidence.members[o]),
        )
        for g, (o, k) in enumerate(zip(evidence.members, held.steps, strict=True))
    }
    predicted = predicted_gain(evidence, choice, rule, intervals)
    return Schedule(
        operators=entries,
        budget={"kind": "flop", "mean_steps": given.baseline, "limit": given.budget, "cost": held.cost},
        objective={
            "in_force_mean_residual": known_mean(spectra.in_force),
            "rule": rule,
            "recoverable": evidence.recoverable,
            "mean_residual": held.mean_residual,
            "max_residual": held.max_residual,
            "baseline_mean_residual": baseline.mean_residual,
            "baseline_max_residual": baseline.max_residual,
            "lower_bound": predicted.pop("lower_bound"),
            "kept_uniform": kept,
            "choice": predicted,
        },
        provenance={
            **provenance,
            "window": [int(spectra.step[0]), int(spectra.step[-1])],
            "snapshots": len(spectra.step),
            "layers": count_layers(spectra.layer),
            "family": evidence.family,
            "below_bfloat16_floor": dict(zip(evidence.members, evidence.means(1 - evidence.residuals.recoverable).tolist(), strict=True)),
            "residual": "Gram residual ‖I − OOᵀ‖_F/√r predicted in float64 from the stored singular values"
            + (" above bfloat16's rounding noise" if evidence.recoverable else ""),
            "optiscope": version("optiscope"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def _shapes(spectra: RecordedSpectra, own: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of an operator's matrices, each shape once, ascending."""
    return tuple(sorted(set(zip(spectra.rows[own].tolist(), spectra.cols[own].tolist(), strict=True))))


def _log_smallest(spectra: RecordedSpectra, roundoff: float) -> Floats:
    """log₁₀ of the smallest x = 1/(κ√sr), or of the rounding noise where it lies below; shape (records, matrices), NaN where not recorded."""
    floor = [precision_floor(m, n, roundoff) for m, n in zip(spectra.rows.tolist(), spectra.cols.tolist(), strict=True)]
    return np.asarray(np.log10(np.maximum(spectra.stored[..., 0], floor)), np.float64)


def mean_residuals(residual: Floats, own: NDArray[np.bool_]) -> Floats:
    """R_g under each schedule: the mean over the operator's matrices and all records; `residual` (schedule, record, matrix)."""
    known = np.isfinite(residual[:, :, own])
    total, count = np.where(known, residual[:, :, own], 0).sum(axis=1), known.sum(axis=1)
    return np.asarray(total.sum(axis=1) / count.sum(axis=1))


def is_cubic(family: str) -> bool:
    """Whether the steps of a family have no fifth power, and so take two products instead of three."""
    return all(c == 0 for _, _, c in SCHEDULES[family](STEPS[-1]))


def _slope(family: str, steps: int) -> float:
    """By how much a step raises small singular values: the geometric mean of a over the family's schedule (Jordan 3.4445, matched about 4)."""
    return prod(a for a, _, _ in SCHEDULES[family](steps)) ** (1 / steps)


def step_costs(rows: NDArray[Any], cols: NDArray[Any], members: Iterable[NDArray[np.bool_]], *, cubic: bool = False) -> list[int]:
    """FLOPs of one Newton–Schulz step over all matrices of each operator; the arrays of shape (matrices,)."""
    flops = [ns_flops(int(m), int(n), cubic=cubic) for m, n in zip(rows, cols, strict=True)]
    return [sum(compress(flops, own)) for own in members]


def _residual(given: Problem, group: int, steps: int) -> float:
    return float(given.residual[group, given.steps.index(steps)])
