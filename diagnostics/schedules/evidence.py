"""What the records of a window say about every operator, and what a choice of steps made from them promises.

:class:`Evidence` holds all that a schedule is chosen by. A choice is then told by what it gains over equal steps for all, how sure that gain is,
and how much of it bfloat16 can keep (:func:`predicted_gain`).

How sure: layers are drawn anew and the steps stay (:mod:`..bootstrap`). The interval tells what another draw of layers would have promised of
these steps, not what another choice would have come to. Steps were chosen on the same layers, so that the gain itself is a little too large.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bootstrap import interval, multiplicities
from ..newton_schulz.recorded_spectra import RecordedSpectra, WindowResiduals
from .allocation import Allocation, Problem, lower_bound, uniform

Floats = NDArray[np.float64]
Ends = tuple[float, float]

# Rule → whether its certificate is that of the capped programme; rules that do not minimise the mean have none.
CERTIFIED = {"mean": True, "mean-uncapped": False}


@dataclass(frozen=True)
class Evidence:
    """Spectra of a window, what each schedule on offer would leave of them, and the allocation problem they pose.

    Attributes:
        spectra: of the matrices that were seen.
        members: operator → which of these matrices are its own, shape (matrices,).
        matrices: operator → the names of all its matrices, seen or not.
        residuals: what each schedule on offer leaves of each spectrum.
        problem: the operators' mean residuals, costs and weights.
        family, recoverable: whose coefficients, and over which singular values the residuals are.
    """

    spectra: RecordedSpectra
    members: Mapping[str, NDArray[np.bool_]]
    matrices: Mapping[str, tuple[str, ...]]
    residuals: WindowResiduals
    problem: Problem
    family: str
    recoverable: bool

    def under(self, steps: Sequence[int], values: Floats) -> Floats:
        """Of `values` (schedules, records, matrices) those under each operator's own steps, shape (records, matrices)."""
        chosen = np.zeros(values.shape[-1], np.int64)
        for own, k in zip(self.members.values(), steps, strict=True):
            chosen[own] = self.problem.steps.index(k)
        return np.asarray(values[chosen, :, np.arange(values.shape[-1])].T)

    def means(self, values: Floats) -> Floats:
        """Of values (records, matrices) the mean over each operator's, shape (operators,); NaN where there are none."""
        return np.array([known_mean(values[:, own]) for own in self.members.values()])


def known_mean(values: Floats) -> float:
    """Mean of the finite ones; NaN where there are none."""
    known = np.isfinite(values)
    return float(values[known].mean()) if known.any() else float("nan")


@dataclass(frozen=True)
class GainIntervals:
    """95 % percentile intervals over layers, None where there are fewer than 3 of them.

    Attributes:
        gain: of objective(uniform) − objective(chosen).
        relative: of the same as a share of objective(uniform).
        baseline: operator → of its mean residual under the uniform steps; the layers counted are its own.
    """

    gain: Ends | None
    relative: Ends | None
    baseline: Mapping[str, Ends | None]


def gain_intervals(
    before: Floats,
    after: Floats,
    members: Mapping[str, NDArray[np.bool_]],
    weight: ArrayLike,
    layers: NDArray[np.integer],
    *,
    largest: bool = False,
) -> GainIntervals:
    """Intervals of the gain from `before` to `after` and of each operator's residual before.

    Args:
        before, after: residual of every spectrum under the uniform and under the chosen steps, shape (records, matrices); NaN where
            not recorded.
        members: operator → its matrices, shape (matrices,).
        weight: of the operators in the mean; over those that a resample holds matrices of it is normalised anew.
        layers: of every matrix, −1 for one without, which counts as a layer of its own.
        largest: whether the objective is the largest mean residual of an operator instead of the weighted mean of all.
    """
    drawn = multiplicities(layers)
    known = np.isfinite(before) & np.isfinite(after)
    own = np.stack(list(members.values()), axis=1).astype(np.float64)  # (matrices, operators)
    sums = [np.where(known, values, 0.0).sum(axis=0) for values in (before, after)]
    # einsum, not a matrix product: BLAS may round by its number of threads, and a training must come to the digits of its run on disk.
    count = np.einsum("rm,mg->rg", drawn, own * known.sum(axis=0)[:, None])
    with np.errstate(invalid="ignore", divide="ignore"):
        uniform, chosen = (np.einsum("rm,mg->rg", drawn, own * total[:, None]) / count for total in sums)
        share = np.where(count > 0, np.asarray(weight, np.float64), 0.0)
        j = [
            np.max(np.where(count > 0, r, -np.inf), axis=-1)
            if largest
            else np.where(count > 0, share * r, 0.0).sum(axis=-1) / share.sum(axis=-1)
            for r in (uniform, chosen)
        ]
        gain, relative = j[0] - j[1], 1 - j[1] / j[0]
    enough = {o: count_layers(layers[mask]) >= 3 for o, mask in members.items()}
    return GainIntervals(_ends(gain), _ends(relative), {o: _ends(uniform[:, g]) if enough[o] else None for g, o in enumerate(members)})


def count_layers(layers: NDArray[np.integer]) -> int:
    """How many layers matrices are of; those without one (−1) each count as a layer of their own.

    >>> count_layers(np.array([0, 0, 1, -1, -1]))
    4
    """
    return len(np.unique(layers[layers >= 0])) + int((layers < 0).sum())


def predicted_gain(evidence: Evidence, choice: Allocation, rule: str, intervals: GainIntervals) -> dict[str, Any]:
    """What the rule chose, and what it gains: in plain data.

    `gain` is objective(uniform) − objective(choice), the objective of "minimax" being the largest residual of an operator and else the
    mean over matrices; `relative_gain` its share of objective(uniform); each with a 95 % interval over layers, null under 3 of them.
    `mean_residuals` holds the means over all singular values and over the recoverable ones, whichever of them was minimised.
    """
    baseline = uniform(evidence.problem)
    before, after = (a.max_residual if rule == "minimax" else a.mean_residual for a in (baseline, choice))
    return {
        "steps": dict(zip(evidence.members, choice.steps, strict=True)),
        "gain": before - after,
        "gain_interval": intervals.gain and list(intervals.gain),
        "relative_gain": 1 - after / before if before > 0 else 0.0,
        "relative_gain_interval": intervals.relative and list(intervals.relative),
        "mean_residuals": {
            over: {
                name: _weighted(evidence, evidence.under(a.steps, evidence.residuals.residual(recoverable=over == "recoverable")))
                for name, a in (("uniform", baseline), ("choice", choice))
            }
            for over in ("all", "recoverable")
        },
        "recoverable_share": recoverable_share(evidence, choice),
        "lower_bound": lower_bound(evidence.problem, capped=CERTIFIED[rule]) if rule in CERTIFIED else None,
    }


def recoverable_share(evidence: Evidence, choice: Allocation) -> float | None:
    """The part of the mean residual's fall, over all singular values, that lies on those above bfloat16's rounding noise; None without a fall.

    ε̃² is a mean over singular values, and ε̃_u − ε̃_c = (ε̃_u² − ε̃_c²)/(ε̃_u + ε̃_c) for the uniform and the chosen steps, so that every
    spectrum's fall is a sum over its singular values, and the share exact. It leaves [0, 1] where one part falls and the other rises.
    """
    steps = uniform(evidence.problem).steps, choice.steps
    u, c = (evidence.under(k, evidence.residuals.square) for k in steps)
    above_u, above_c = (evidence.under(k, evidence.residuals.square_recoverable) for k in steps)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.where(u + c > 0, np.sqrt(u) + np.sqrt(c), np.inf)
        scale = np.where(np.isfinite(u) & np.isfinite(c), scale, np.nan)
        fall, above = (_weighted(evidence, part / scale) for part in (u - c, above_u - above_c))
    return above / fall if fall > 1e-9 else None


def _weighted(evidence: Evidence, values: Any) -> float:
    return float((evidence.problem.weight * evidence.means(values)).sum())


def _ends(distribution: Floats) -> Ends | None:
    low, high = interval(distribution)
    return (float(low), float(high)) if np.isfinite(low) and np.isfinite(high) else None
