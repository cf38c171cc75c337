"""The allocator against the worked example, against brute force, and against the traps that greedy rules fall into."""

from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients
from optiscope.diagnostics.newton_schulz.spectral_map import ns_flops
from optiscope.diagnostics.schedules.allocation import RULES, evaluate, least_maximum, least_mean, lower_bound, problem, uniform

JORDAN = (3.4445, -4.7750, 2.0315)

# The worked example: 28 layers of a Qwen3-0.6B, spectra s_i = 10^(−L((i−1)/(r−1))^γ).
SHAPES = {
    "q": (2048, 1024), "k": (1024, 1024), "v": (1024, 1024), "o": (1024, 2048), "gate": (3072, 1024), "up": (3072, 1024), "down": (1024, 3072),
}  # fmt: skip
MU = (3.6, 3.5, 4.4, 3.2, 3.0, 2.8, 2.3)
STEPS = (3, 4, 5, 6, 7, 8)

# R_g(k) for k = 3..8 under matched coefficients, as published with the example.
MATCHED = {
    "q": (0.813, 0.703, 0.563, 0.394, 0.198, 0.054),
    "k": (0.828, 0.720, 0.582, 0.402, 0.181, 0.041),
    "v": (0.848, 0.765, 0.666, 0.552, 0.416, 0.249),
    "o": (0.796, 0.673, 0.512, 0.317, 0.139, 0.041),
    "gate": (0.776, 0.635, 0.444, 0.224, 0.076, 0.034),
    "up": (0.771, 0.611, 0.392, 0.197, 0.071, 0.034),
    "down": (0.718, 0.508, 0.260, 0.134, 0.061, 0.034),
}


@pytest.fixture(scope="module")
def example():
    """log10 κ (7, 28), residuals (7, 6) under matched and Jordan's coefficients, and x_r (7, 28); polynomials and residual written out."""
    rng = np.random.default_rng(0)
    log_kappa, spectra = np.zeros((7, 28)), np.zeros((7, 28, 1024))
    for layer in range(28):
        for g, mu in enumerate(MU):
            log_kappa[g, layer] = mu + 0.25 * rng.standard_normal() + 0.3 * np.cos(2 * np.pi * layer / 28)
            gamma = np.exp(0.35 * rng.standard_normal())
            s = 10 ** (-log_kappa[g, layer] * (np.arange(1024) / 1023) ** gamma)
            spectra[g, layer] = s / np.sqrt(np.sum(s**2))

    def mean_residual(coefficients):
        o = spectra
        for a, b, c in coefficients:
            square = o * o
            o = o * (a + square * (b + c * square))
        return np.sqrt(np.mean((1 - o * o) ** 2, axis=-1)).mean(axis=-1)

    matched = np.stack([mean_residual(matched_coefficients(k)) for k in STEPS], axis=1)
    jordan = np.stack([mean_residual((JORDAN,) * k) for k in STEPS], axis=1)
    return log_kappa, matched, jordan, spectra[:, :, -1]


COST = [ns_flops(*shape) // (2 * 1024**3) for shape in SHAPES.values()]


def test_the_example_is_the_one_published(example):
    log_kappa, matched, _, _ = example
    assert np.median(log_kappa, axis=1).round(2).tolist() == [3.51, 3.52, 4.37, 3.32, 2.99, 2.79, 2.21]
    assert COST == [5, 3, 3, 5, 7, 7, 7]
    assert {name: tuple(row) for name, row in zip(SHAPES, matched.round(3).tolist(), strict=True)} == MATCHED
    # None of the curves is convex: somewhere a step gains more than the one before.
    assert (np.diff(matched, n=2) < 0).any(axis=1).all()


ROWS = {
    # (budget, rule): steps per operator, mean and largest residual, cost
    ("flop", "uniform"): ((5, 5, 5, 5, 5, 5, 5), 0.4883, 0.6661, 185),
    ("flop", "mean-uncapped"): ((5, 8, 8, 7, 3, 3, 5), 0.3998, 0.7755, 185),
    ("flop", "mean"): ((5, 7, 8, 6, 4, 4, 4), 0.4378, 0.6349, 184),
    ("flop", "minimax"): ((5, 6, 6, 5, 5, 5, 4), 0.4819, 0.5626, 184),
    ("count", "mean-uncapped"): ((3, 8, 3, 3, 7, 6, 5), 0.4332, 0.8480, 35),
    ("count", "minimax"): ((5, 5, 6, 5, 5, 5, 4), 0.5075, 0.5819, 35),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_worked_example_is_reproduced(example, row):
    budget, rule = row
    found = RULES[rule](problem(example[1], STEPS, COST if budget == "flop" else [1] * 7, [1] * 7))
    assert (found.steps, round(found.mean_residual, 4), round(found.max_residual, 4), found.cost) == ROWS[row]


def test_the_worked_example_under_jordan(example):
    given = problem(example[2], STEPS, COST, [1] * 7)
    before, after = uniform(given), RULES["mean"](given)
    assert (round(before.mean_residual, 4), round(before.max_residual, 4), before.cost) == (0.6108, 0.7371, 185)
    assert (after.steps, round(after.mean_residual, 4), round(after.max_residual, 4), after.cost) == (
        (5, 8, 5, 6, 4, 4, 5),
        0.5883,
        0.7371,
        185,
    )


@pytest.mark.parametrize("by", ["κ", "κ√sr"])
def test_the_worked_example_from_condition_numbers_alone(example, by):
    log_kappa, matched, _, smallest = example
    decades = log_kappa.mean(axis=1) if by == "κ" else np.log10(1 / smallest).mean(axis=1)
    found = RULES["kappa"](problem(matched, STEPS, COST, [1] * 7, needed=decades / np.log10(4)))
    assert (found.steps, round(found.mean_residual, 4), round(found.max_residual, 4), found.cost) == (
        (6, 6, 7, 5, 5, 4, 4),
        0.4696,
        0.6114,
        185,
    )


def test_the_worked_examples_certificate(example):
    assert round(lower_bound(problem(example[1], STEPS, COST, [1] * 7)), 4) == 0.4290


def test_without_the_cap_the_hardest_operator_pays(example):
    # The trap that the cap is for: v is given up to make the sum least.
    given = problem(example[1], STEPS, [1] * 7, [1] * 7)
    assert least_mean(given, capped=False).max_residual > uniform(given).max_residual
    assert least_mean(given).max_residual <= uniform(given).max_residual


CURVES = ("convex", "sigmoid", "any")
COSTS = {"equal": lambda rng: np.ones(4, int), "small": lambda rng: rng.integers(1, 9, 4), "coprime": lambda rng: rng.choice(PRIMES, 4)}
PRIMES = np.array([1_000_003, 1_299_709, 2_750_159, 7_368_787, 15_485_863, 32_452_843])


def instance(rng, curve, cost):
    """A random problem of 4 groups and 5 step counts, of the given kind."""
    if curve == "convex":
        drops = -np.sort(-rng.exponential(0.1, (4, 4)), axis=1)
        residual = 1 - np.concatenate([np.zeros((4, 1)), np.cumsum(drops, axis=1)], axis=1)
    elif curve == "sigmoid":
        residual = 1 / (1 + np.exp(rng.uniform(0.5, 4, (4, 1)) * (np.arange(5) - rng.uniform(0, 5, (4, 1)))))
    else:
        # Few values, so that ties occur.
        residual = rng.integers(0, 12, (4, 5)) / 10
    return problem(residual, range(3, 8), COSTS[cost](rng), rng.uniform(0.5, 2, 4), needed=[0.3, 1.0, 0.0, 2.5])


def everything(given):
    """Every choice of steps within the budget, as (steps, Σ W R, max R, Σ C k), by counting."""
    for columns in product(range(len(given.steps)), repeat=len(given.cost)):
        steps = tuple(given.steps[i] for i in columns)
        cost = sum(int(c) * k for c, k in zip(given.cost, steps, strict=True))
        if cost <= sum(int(c) for c in given.cost) * given.baseline:
            residuals = [float(given.residual[g][i]) for g, i in enumerate(columns)]
            yield steps, sum(float(w) * r for w, r in zip(given.weight, residuals, strict=True)), max(residuals), cost


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("curve", CURVES)
def test_the_programme_equals_brute_force(curve, cost):
    rng = np.random.default_rng([CURVES.index(curve), list(COSTS).index(cost)])
    for _ in range(60):
        given = instance(rng, curve, cost)
        choices = list(everything(given))
        cap = max(float(row[given.steps.index(5)]) for row in given.residual)
        free, capped, minimax = least_mean(given, capped=False), least_mean(given), least_maximum(given)
        # Sums of four terms below 2: 1e-11 is rounding at 12 digits per term.
        assert free.mean_residual == pytest.approx(min(total for _, total, _, _ in choices), abs=1e-11)
        assert capped.mean_residual == pytest.approx(min(total for _, total, worst, _ in choices if worst <= cap), abs=1e-11)
        assert minimax.max_residual == min(worst for _, _, worst, _ in choices)
        assert capped.max_residual <= cap
        for found in (free, capped, minimax):
            total, worst, spent = next(row[1:] for row in choices if row[0] == found.steps)
            assert (found.mean_residual, found.max_residual, found.cost) == (pytest.approx(total, abs=1e-12), worst, spent)
        # The relaxation's optimum is below; HiGHS solves to 1e-7.
        assert lower_bound(given, capped=False) <= free.mean_residual + 1e-7
        assert lower_bound(given) <= capped.mean_residual + 1e-7


@pytest.mark.parametrize("capped", [True, False])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("cost", COSTS)
def test_the_bound_is_the_linear_programmes(curve, cost, capped):
    rng = np.random.default_rng(7)
    for _ in range(60):
        given = instance(rng, curve, cost)
        allowed = given.residual <= given.cap if capped else np.full(given.residual.shape, True)
        solved = linprog(
            (given.weight[:, None] * given.residual).ravel(),
            A_ub=np.outer(given.cost, given.steps).ravel()[None, :] / given.budget,
            b_ub=[1.0],
            A_eq=np.kron(np.eye(4), np.ones(5)),
            b_eq=np.ones(4),
            bounds=[(0, 1 if ok else 0) for ok in allowed.ravel()],
            method="highs",
        )
        # The solver's own tolerance is 1e-7.
        assert lower_bound(given, capped=capped) == pytest.approx(solved.fun, abs=1e-6)


def greedy(given):
    """Always buy the affordable step with the largest drop of Σ W R per cost."""
    steps = [given.steps[0]] * len(given.cost)
    while True:
        spent = sum(int(c) * k for c, k in zip(given.cost, steps, strict=True))
        offers = []
        for g, k in enumerate(steps):
            i = given.steps.index(k)
            if i + 1 < len(given.steps) and spent + int(given.cost[g]) <= given.budget:
                offers.append(((given.residual[g][i] - given.residual[g][i + 1]) * given.weight[g] / given.cost[g], g))
        if not offers or max(offers)[0] <= 0:
            return evaluate(given, steps)
        steps[max(offers)[1]] += 1


def test_greedy_falls_into_the_trap_and_the_programme_does_not():
    # The first group needs three steps before anything happens; each of them gains less than the second group's small change.
    given = problem([[1, 1, 1, 0.0, 0], [0.30, 0.29, 0.28, 0.27, 0.26]], range(3, 8), [1, 1], [1, 1], baseline=5)
    assert greedy(given).steps == (3, 7)
    assert least_mean(given).steps == (6, 4)
    assert least_mean(given).mean_residual < 0.25 * greedy(given).mean_residual


def test_greedy_is_exact_on_convex_curves_of_equal_cost_and_fails_on_sigmoid_ones():
    rng = np.random.default_rng(7)
    gaps = {
        curve: [
            greedy(given).mean_residual - least_mean(given, capped=False).mean_residual
            for given in (instance(rng, curve, "equal") for _ in range(100))
        ]
        for curve in ("convex", "sigmoid")
    }
    assert max(gaps["convex"]) < 1e-11
    assert sum(gap > 1e-3 for gap in gaps["sigmoid"]) > 20


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(COSTS)))
def test_scaling_costs_or_weights_changes_nothing(seed, cost):
    given = instance(np.random.default_rng(seed), "any", cost)
    scaled = problem(given.residual, given.steps, given.cost * 7, given.weight * 3, needed=given.needed)
    for rule in RULES.values():
        assert rule(scaled).steps == rule(given).steps


def test_equal_results_are_told_apart_by_cost_then_maximum_then_order():
    # Nothing gains: the cheapest choice.
    assert least_mean(problem(np.full((2, 3), 0.5), (3, 4, 5), [2, 3], [1, 1], baseline=4)).steps == (3, 3)
    # 0.2 + 0.6 and 0.4 + 0.4 are one sum at one cost: the lower maximum.
    given = problem([[0.6, 0.4, 0.2]] * 2, (3, 4, 5), [1, 1], [1, 1], baseline=4)
    assert least_mean(given).steps == (4, 4)
    # (3, 4) and (4, 3) are equal in everything: the earlier group gets the step.
    given = problem([[0.6, 0.4, 0.4]] * 2, (3, 4, 5), [1, 1], [2, 2], baseline=4)
    assert least_mean(given).steps == (4, 4)
    given = problem([[0.6, 0.4]] * 3, (3, 4), [3, 3, 1], [1, 1, 1], baseline=3)
    assert least_mean(given).steps == (3, 3, 3)
    given = problem([[0.6, 0.6, 0.4], [0.6, 0.6, 0.4]], (3, 4, 5), [1, 1], [1, 1], baseline=4)
    assert [least_mean(given).steps for _ in range(3)] == [(5, 3)] * 3


def test_differences_below_a_billionth_are_ties():
    given = problem([[0.6, 0.6, 0.4 - 1e-12], [0.6, 0.6, 0.4 - 3e-12]], (3, 4, 5), [1, 1], [1, 1], baseline=4)
    assert least_mean(given).steps == (5, 3)


def test_minimax_spends_what_is_left_on_the_worst_that_can_improve():
    # τ = 0.5 is settled by group 0, which cannot get below it; the rest of the budget still helps group 1.
    given = problem([[0.9, 0.5, 0.5], [0.4, 0.3, 0.2]], (3, 4, 5), [1, 1], [1, 1], baseline=4)
    assert least_maximum(given).steps == (4, 4)
    assert evaluate(given, (4, 3)).max_residual == least_maximum(given).max_residual == 0.5


def test_weights_are_normalised_and_the_budget_is_the_baselines():
    given = problem([[0.5, 0.4], [0.3, 0.2]], (3, 4), [5, 7], [3, 1], baseline=3)
    assert given.weight.tolist() == [0.75, 0.25]
    assert given.budget == 36
    assert given.cap == 0.5
    assert uniform(given) == evaluate(given, (3, 3))
    assert uniform(given).mean_residual == pytest.approx(0.45, abs=1e-15)


def test_fifteen_groups_of_costs_without_a_common_unit_are_quick():
    rng = np.random.default_rng(0)
    residual = np.sort(rng.random((15, 6)), axis=1)[:, ::-1]
    given = problem(residual, range(3, 9), rng.integers(10**9, 10**11, 15), np.ones(15))
    # 6^15 choices cannot be tried. The relaxation splits one group at most, whose share of the mean is 1/15.
    bound, found = lower_bound(given, capped=False), least_mean(given, capped=False)
    assert bound <= found.mean_residual <= bound + 1 / 15


def by_condition(needed, cost, low, high, baseline=5):
    """k_g = k̄ + needed_g − Σ C needed/Σ C, in exact fractions; clipped, rounded down, and the leftovers by largest remainder."""
    total = sum(cost)
    mean = sum(c * n for c, n in zip(cost, needed, strict=True)) / Fraction(total)
    wanted = [baseline + n - mean for n in needed]
    steps = [floor(min(max(k, a), b)) for k, a, b in zip(wanted, low, high, strict=True)]

    def spent():
        return sum(c * k for c, k in zip(cost, steps, strict=True))

    while spent() > baseline * total:
        steps[min((g for g in range(len(cost)) if steps[g] > low[g]), key=lambda g: wanted[g] - steps[g])] -= 1
    while paid := [g for g in range(len(cost)) if steps[g] < high[g] and spent() + cost[g] <= baseline * total]:
        steps[max(paid, key=lambda g: wanted[g] - steps[g])] += 1
    return tuple(steps)


@pytest.mark.parametrize("spread", [0.5, 3, 20])
def test_the_condition_rule_in_exact_fractions(spread):
    rng, clipped, overspent = np.random.default_rng(int(10 * spread)), 0, 0
    for _ in range(200):
        cost = rng.integers(1, 9, 5).tolist()
        # Sixty-fourths are exact in float64; a thousandth more for each group keeps remainders from ties.
        needed = [Fraction(int(n), 64) + Fraction(g, 1024) for g, n in enumerate(rng.integers(0, int(64 * spread), 5))]
        given = problem(np.ones((5, 6)), STEPS, cost, np.ones(5), needed=[float(n) for n in needed])
        found = RULES["kappa"](given)
        assert found.steps == by_condition(needed, cost, [3] * 5, [8] * 5)
        assert found.cost <= given.budget
        clipped += 3 in found.steps and 8 in found.steps
        wanted = [5 + n - sum(c * m for c, m in zip(cost, needed, strict=True)) / Fraction(sum(cost)) for n in needed]
        overspent += sum(c * floor(min(max(k, 3), 8)) for c, k in zip(cost, wanted, strict=True)) > given.budget
    # Wide spreads are cut off at both ends, and the lower end costs more than the budget.
    assert (clipped > 100) == (spread == 20)
    assert (overspent > 0) == (spread == 20)


def test_the_condition_rule_needs_condition_numbers():
    with pytest.raises(ValueError, match=r"^needed: expected the steps each group's smallest singular values need"):
        RULES["kappa"](problem([[0.5, 0.4]], (3, 4), [1], [1], baseline=3))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("rule", ["mean", "mean-uncapped", "minimax", "kappa"])
def test_with_steps_in_force_a_choice_is_the_best_within_one_step(rule, curve):
    rng = np.random.default_rng(8)
    for _ in range(60):
        plain = instance(rng, curve, "small")
        everywhere = [choice for choice in everything(plain)]
        current = everywhere[rng.integers(len(everywhere))][0]
        given = replace(plain, current=current, needed=rng.uniform(0, 3, 4))
        now = dict(zip(range(4), current, strict=True))

        def residual(g, k, given=given):
            return given.residual[g, given.steps.index(k)]

        near = [choice for choice in everywhere if all(abs(k - now[g]) <= 1 for g, k in enumerate(choice[0]))]
        if rule == "mean":
            near = [c for c in near if all(residual(g, k) <= max(plain.cap, residual(g, now[g])) for g, k in enumerate(c[0]))]
        found = RULES[rule](given)
        assert found.steps in [steps for steps, *_ in near]
        assert found.cost <= plain.budget
        place = {"mean": 1, "mean-uncapped": 1, "minimax": 2}.get(rule)
        if place is not None:
            assert (found.mean_residual, found.max_residual)[place - 1] == pytest.approx(min(c[place] for c in near), abs=1e-9)


BAD = {
    "one row per group": ([[0.5, 0.4]], (3, 4), [1, 1], [1, 1]),
    "one column per step count": ([[0.5, 0.4], [0.5, 0.4]], (3, 4, 5), [1, 1], [1, 1]),
    "got shape (0,) for 0 groups": ([], (3, 4), [], []),
    "residual: expected finite": ([[0.5, np.nan], [0.5, 0.4]], (3, 5), [1, 1], [1, 1]),
    "cost, weight: expected positive": ([[0.5, 0.4], [0.5, 0.4]], (3, 5), [1, 0], [1, 1]),
    "weight: expected positive": ([[0.5, 0.4], [0.5, 0.4]], (3, 5), [1, 1], [1, np.nan]),
    "steps: expected ascending": ([[0.5, 0.4], [0.5, 0.4]], (5, 3), [1, 1], [1, 1]),
    "baseline: expected one of the step counts [3, 4], got 5": ([[0.5, 0.4], [0.5, 0.4]], (3, 4), [1, 1], [1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        problem(*BAD[message])
    assert message in str(caught.value)
