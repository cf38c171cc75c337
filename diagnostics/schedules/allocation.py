"""Dividing a Newton–Schulz budget among operators: an exact programme over residual curves.

Groups g with residual R_g(k) after k steps, cost C_g per step and weight W_g:

    minimise Σ_g W_g R_g(k_g)   subject to   Σ_g C_g k_g ≤ budget,   R_g(k_g) ≤ τ = max_h R_h(k̄)

The cap τ means that no operator ends worse than the worst one does under k̄ steps for all: without it the sum is often
least when the hardest operator is given up. Curves may have any shape (real ones are S-shaped, Jordan's not even
monotone), so greedy rules fail and the programme is solved exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MAX_GROUPS = 400  # the time of an exact solution grows with their square: 5 s for 300


@dataclass(frozen=True)
class Problem:
    """An allocation problem.

    Attributes:
        residual: R_g(k), shape (groups, len(steps)).
        steps: the step counts on offer, ascending; the uniform baseline is one of them.
        cost: C_g per step, positive integers, shape (groups,).
        weight: W_g, shape (groups,), Σ W = 1.
        baseline: k̄, the uniform step count whose cost is the budget.
        needed: steps until the smallest singular values are of order 1, log_a(κ√sr) by the slope a of the coefficients, averaged over each
            group, shape (groups,); None where it is not known. Only :func:`by_condition` asks for it.
        current: the steps in force, which a choice may change by 1 per group; None where nothing is in force yet.
    """

    residual: Floats
    steps: tuple[int, ...]
    cost: NDArray[np.int64]
    weight: Floats
    baseline: int
    needed: Floats | None = None
    current: tuple[int, ...] | None = None

    @property
    def budget(self) -> int:
        """Σ_g C_g k̄."""
        return int(self.cost.sum()) * self.baseline

    @property
    def cap(self) -> float:
        """τ: the largest residual of any group under the uniform baseline."""
        return float(self.residual[:, self.steps.index(self.baseline)].max())

    def on_offer(self, *, capped: bool = False) -> NDArray[np.bool_]:
        """Which step counts each group may take, shape (groups, len(steps)).

        Where steps are in force, the cap lets a group keep what it has: it may lie above a cap that fell since, and to get below
        it may cost more than there is.
        """
        if self.current is None:
            return np.asarray(self.residual <= self.cap if capped else np.ones_like(self.residual, dtype=bool))
        now = np.array(self.current)[:, None]
        near = np.abs(np.array(self.steps) - now) <= 1
        as_now = self.residual[np.array(self.steps) == now][:, None]
        return np.asarray(near & (self.residual <= np.maximum(self.cap, as_now)) if capped else near)


@dataclass(frozen=True)
class Allocation:
    """Steps per group and what they give: Σ W R, max R, Σ C k."""

    steps: tuple[int, ...]
    mean_residual: float
    max_residual: float
    cost: int


def problem(
    residual: ArrayLike, steps: Sequence[int], cost: ArrayLike, weight: ArrayLike, baseline: int = 5, needed: ArrayLike | None = None
) -> Problem:
    """Check and normalise the parts of an allocation problem. Residuals are rounded to 1e-9, so that ties are ties.

    Raises:
        ValueError: more groups than :data:`MAX_GROUPS`, shapes that do not match, residuals that are not finite, costs below 1, steps out of order, or a baseline not on offer.
    """
    r, c, w = np.asarray(residual, np.float64), np.asarray(cost, np.int64), np.asarray(weight, np.float64)
    if r.shape != (len(c), len(steps)) or w.shape != c.shape or not len(c):
        raise ValueError(
            f"residual: expected one row per group and one column per step count, got shape {r.shape} for {len(c)} groups, {len(steps)} counts"
        )
    few_enough(len(c))
    if not np.isfinite(r).all():
        raise ValueError("residual: expected finite residuals; leave out groups that were not recorded")
    # Not `w <= 0`: NaN would pass.
    if not ((c >= 1).all() and (w > 0).all()):
        raise ValueError("cost, weight: expected positive numbers")
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"steps: expected ascending step counts, got {list(steps)}")
    if baseline not in steps:
        raise ValueError(f"baseline: expected one of the step counts {list(steps)}, got {baseline}")
    return Problem(np.round(r, 9), tuple(steps), c, w / w.sum(), baseline, None if needed is None else np.asarray(needed, np.float64))


def few_enough(groups: int) -> None:
    """Refuse more groups than :data:`MAX_GROUPS`.

    Raises:
        ValueError: they are more.
    """
    if groups > MAX_GROUPS:
        raise ValueError(
            f"operators: expected at most {MAX_GROUPS} to give steps to, got {groups}; give matrices of one kind one name (attach with operators=…)"
        )


def evaluate(given: Problem, steps: Sequence[int]) -> Allocation:
    """What a choice of steps gives."""
    chosen = np.array([given.steps.index(k) for k in steps])
    residuals = given.residual[np.arange(len(chosen)), chosen]
    return Allocation(tuple(steps), float(given.weight @ residuals), float(residuals.max()), int(given.cost @ np.array(steps)))


def uniform(given: Problem) -> Allocation:
    """The baseline: k̄ steps for every group."""
    return evaluate(given, [given.baseline] * len(given.cost))


def least_mean(given: Problem, *, capped: bool = True) -> Allocation:
    """The exact minimum of Σ W R under the budget, and under the cap unless `capped` is false.

    Dynamic programme over groups. States are (cost, Σ W R); one that costs no less and gives no less than another is
    dropped, which keeps the programme exact for any costs without a common unit. Of equal results the cheaper wins,
    then the one with the lower maximum, then the one with more steps for the earlier group.
    """
    allowed = given.on_offer(capped=capped)
    # What the groups to come cost at least: a state that cannot pay for them leads nowhere.
    cheapest = [int(given.cost[g]) * min(k for k, ok in zip(given.steps, allowed[g], strict=True) if ok) for g in range(len(given.cost))]
    reserve = [sum(cheapest[g + 1 :]) for g in range(len(cheapest))]
    # (cost, Σ W R, max R, negated steps): tuple order is the preference among equals.
    states: list[tuple[int, float, float, tuple[int, ...]]] = [(0, 0.0, 0.0, ())]
    for g in range(len(given.cost)):
        grown = [
            (cost + int(given.cost[g]) * k, round(total + float(given.weight[g] * r), 12), max(worst, float(r)), (*chosen, -k))
            for cost, total, worst, chosen in states
            for k, r, ok in zip(given.steps, given.residual[g], allowed[g], strict=True)
            if ok and cost + int(given.cost[g]) * k + reserve[g] <= given.budget
        ]
        states = _undominated(grown)
    _, _, _, chosen = min(states, key=lambda state: (state[1], state[0], state[2], state[3]))
    return evaluate(given, [-k for k in chosen])


def _undominated(states: list[tuple[int, float, float, tuple[int, ...]]]) -> list[tuple[int, float, float, tuple[int, ...]]]:
    kept: list[tuple[int, float, float, tuple[int, ...]]] = []
    for state in sorted(states):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def least_maximum(given: Problem) -> Allocation:
    """The exact minimum of max_g R_g(k_g) under the budget, what is left spent on the worst group that can still improve.

    For a threshold τ, k_g(τ) = min{k: R_g(k) ≤ τ} is cheapest; τ is found by bisection over the finite set of residuals.
    """
    allowed = given.on_offer()
    thresholds = np.unique(given.residual[allowed])

    def cheapest(threshold: float) -> list[int] | None:
        meets = allowed & (given.residual <= threshold)
        if not meets.any(axis=1).all():
            return None
        steps = [given.steps[i] for i in meets.argmax(axis=1)]
        return steps if int(given.cost @ np.array(steps)) <= given.budget else None

    low, high = 0, len(thresholds) - 1  # the largest threshold lets every group take its fewest steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cheapest(float(thresholds[middle])) else (middle + 1, high)
    steps = cheapest(float(thresholds[low]))
    assert steps is not None
    return _spend_rest(given, steps)


def _spend_rest(given: Problem, steps: list[int]) -> Allocation:
    """Raise the worst group to its next better affordable step count, again and again."""
    allowed = given.on_offer()
    while True:
        now = evaluate(given, steps)
        residuals = [float(given.residual[g, given.steps.index(k)]) for g, k in enumerate(steps)]
        for g in sorted(range(len(steps)), key=lambda g: -residuals[g]):
            better = [
                k
                for k, r, ok in zip(given.steps, given.residual[g], allowed[g], strict=True)
                if ok and k > steps[g] and r < residuals[g] and now.cost + int(given.cost[g]) * (k - steps[g]) <= given.budget
            ]
            if better:
                steps = [*steps[:g], better[0], *steps[g + 1 :]]
                break
        else:
            return now


def by_condition(given: Problem) -> Allocation:
    """Steps from κ√sr alone, no residual curve: k_g = k̄ + needed_g − mean_C needed, so that a^k x_r becomes alike for all.

    The linear regime: residuals fall once a^k x_r ≈ 1, x_r = 1/(κ√sr). Rounded down to the counts on offer; what is left of the budget goes
    step by step to the group that lacks most of its k_g and can be paid, and what was overspent by the counts' lower end comes from the one
    that has most beyond it.
    """
    if given.needed is None:
        raise ValueError("needed: expected the steps each group's smallest singular values need; this rule has nothing else to go by")
    counts, allowed, groups = np.array(given.steps), given.on_offer(), np.arange(len(given.cost))
    # Rounded as residuals are, so that ties are ties.
    wanted = np.round(given.baseline + given.needed - float((given.cost * given.needed).sum() / given.cost.sum()), 9)
    lowest, highest = allowed.argmax(axis=1), len(counts) - 1 - allowed[:, ::-1].argmax(axis=1)
    chosen = np.clip(np.searchsorted(counts, wanted, side="right") - 1, lowest, highest)

    def left() -> int:
        return given.budget - int((given.cost * counts[chosen]).sum())

    while left() < 0:
        chosen[min(groups[chosen > lowest], key=lambda g: wanted[g] - counts[chosen[g]])] -= 1
    while payable := [
        g for g in groups[chosen < highest] if given.cost[g] * (counts[chosen[g] + 1] - counts[chosen[g]]) <= left()
    ]:  # fmt: skip
        chosen[max(payable, key=lambda g: wanted[g] - counts[chosen[g]])] += 1
    return evaluate(given, counts[chosen].tolist())


def lower_bound(given: Problem, *, capped: bool = True) -> float:
    """A certificate: the linear relaxation (shares z_gk of each step count, Σ_k z_gk = 1) is below every allocation's Σ W R.

    Its minimum spends the budget along the lower convex hull of each group's (C k, W R), the steepest pieces of all hulls
    first and the last one in part (Sinha, Zoltners, "The multiple-choice knapsack problem", 1979).
    """
    allowed = given.on_offer(capped=capped)
    left, bound = float(given.budget), 0.0
    pieces: list[tuple[float, float]] = []  # (Σ W R per FLOP, FLOPs)
    for g in range(len(given.cost)):
        points = [
            (float(given.cost[g] * k), float(given.weight[g] * r))
            for k, r, ok in zip(given.steps, given.residual[g], allowed[g], strict=True)
            if ok
        ]
        hull = _falling_hull(points)
        left -= hull[0][0]
        bound += hull[0][1]
        pieces += [((r1 - r0) / (c1 - c0), c1 - c0) for (c0, r0), (c1, r1) in pairwise(hull)]
    for slope, flops in sorted(pieces):
        spent = min(flops, left)
        bound += slope * spent
        left -= spent
    return bound


def _falling_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Lower convex hull of points in ascending order, from the first to the lowest."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    return hull


RULES: Mapping[str, Callable[[Problem], Allocation]] = {
    "mean": least_mean,
    "mean-uncapped": lambda given: least_mean(given, capped=False),
    "minimax": least_maximum,
    "uniform": uniform,
    "kappa": by_condition,
}
