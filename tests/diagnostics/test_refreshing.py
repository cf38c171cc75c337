"""Retained gain and refreshes against all choices tried one by one, in float64 loops of their own."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients
from optiscope.diagnostics.newton_schulz.recorded_spectra import RecordedSpectra
from optiscope.diagnostics.schedules.deriving import schedule_from_spectra
from optiscope.diagnostics.schedules.refreshing import Refresh, next_schedule, retained_gain
from optiscope.diagnostics.schedules.schedule_file import OperatorSchedule, Schedule

SHAPES = {"attn_q": (16, 16), "attn_v": (8, 16), "mlp_up": (48, 16), "mlp_down": (12, 32)}
LAYERS, COUNTS = 4, range(3, 9)


def residual(x, k):
    """√(mean_i (1 − o_i²)²) after the k matched steps, one singular value at a time."""
    terms = []
    for value in x:
        for a, b, c in matched_coefficients(k):
            value = a * value + b * value**3 + c * value**5
        terms.append((1 - value**2) ** 2)
    return (sum(terms) / len(terms)) ** 0.5


def window(decades, *, records=3, seed=0):
    """Spectra of so many decades per operator, with some scatter, and the same as a list per operator."""
    rng = np.random.default_rng(seed)
    names, rows, stored, plain = [], [], [], {o: [] for o in decades}
    for layer in range(LAYERS):
        for operator, depth in decades.items():
            rank = min(SHAPES[operator])
            spectra = []
            for _ in range(records):
                s = 10 ** -(np.linspace(0, 1, rank) * max(0.2, depth + 0.3 * rng.standard_normal()))
                spectra.append(s / np.linalg.norm(s))
            plain[operator] += spectra
            # Ranks under 64 are stored whole, in ascending order, repeated to fill.
            stored.append([x[::-1][np.rint(np.linspace(0, rank - 1, 64)).astype(int)] for x in spectra])
            names.append(f"layers.{layer}.{operator}.weight")
            rows.append((operator, layer, *SHAPES[operator]))
    operator, layer, m, n = (np.array(column) for column in zip(*rows, strict=True))
    values = np.array(stored).transpose(1, 0, 2)
    spectra = RecordedSpectra(np.array(names), operator, layer, m, n, 10 * np.arange(records), values, np.full(values.shape[:2], 0.5))
    return spectra, plain


def table(plain):
    """R_g(k) and the FLOPs of a step of each operator."""
    curves = {o: {k: np.mean([residual(x, k) for x in spectra]) for k in COUNTS} for o, spectra in plain.items()}
    cost = {o: LAYERS * 2 * (2 * min(s) ** 2 * max(s) + min(s) ** 3) for o, s in SHAPES.items() if o in plain}
    return curves, cost


def steps_of(schedule):
    return {o: entry.steps for o, entry in schedule.operators.items()}


def mean(curves, steps):
    return np.mean([curves[o][k] for o, k in steps.items()])


def flops(cost, steps):
    return sum(cost[o] * k for o, k in steps.items())


def affordable(cost, choices):
    return [chosen for k in product(*choices) if flops(cost, chosen := dict(zip(cost, k, strict=True))) <= 5 * sum(cost.values())]


EARLY = {"attn_q": 2.5, "attn_v": 3.5, "mlp_up": 1.0, "mlp_down": 2.0}
LATER = {"attn_q": 2.0, "attn_v": 2.0, "mlp_up": 2.0, "mlp_down": 4.0}


@pytest.mark.parametrize("rule", ["mean", "mean-uncapped"])
def test_retained_gain_is_that_of_all_allocations_tried_one_by_one(rule):
    committed = schedule_from_spectra(window(EARLY)[0], rule=rule)
    found = {}
    for name, decades in (("same", EARLY), ("later", LATER)):
        spectra, plain = window(decades)
        curves, cost = table(plain)
        uniform = dict.fromkeys(cost, 5)
        cap = max(curves[o][5] for o in cost) if rule == "mean" else np.inf
        oracle = min(mean(curves, a) for a in affordable(cost, [COUNTS] * 4) if max(curves[o][k] for o, k in a.items()) <= cap)
        before = mean(curves, uniform)
        gain, possible = (1 - j / before for j in (mean(curves, steps_of(committed)), oracle))
        found[name] = retained_gain(spectra, committed)
        # Residuals are rounded to 1e-9.
        assert found[name] == pytest.approx((gain / possible, gain, possible), abs=1e-6)
    assert found["same"][0] == pytest.approx(1)
    assert found["later"][0] < 0.95


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", ["mean", "mean-uncapped", "minimax"])
def test_a_refresh_is_the_best_of_all_choices_within_one_step(rule, seed):
    committed = schedule_from_spectra(window(EARLY)[0], rule=rule)
    spectra, plain = window(LATER, seed=seed)
    curves, cost = table(plain)
    now = steps_of(committed)
    cap = max(curves[o][5] for o in cost) if rule == "mean" else np.inf
    within = affordable(cost, [[k for k in (n - 1, n, n + 1) if k in COUNTS] for n in now.values()])
    allowed = [a for a in within if all(curves[o][k] <= max(cap, curves[o][now[o]]) + 1e-9 for o, k in a.items())]

    def objective(chosen):
        return max(curves[o][k] for o, k in chosen.items()) if rule == "minimax" else mean(curves, chosen)

    best = min(map(objective, allowed))
    first = next_schedule(committed, spectra)
    assert first.improvement == pytest.approx(1 - best / objective(now), abs=1e-6)
    assert first.improvement > 0.02  # else the rest shows nothing
    # One refresh is not enough, the second that agrees is.
    assert (first.schedule, first.adopted, first.state) == (committed, False, {"agreeing": 1})
    second = next_schedule(committed, spectra, json.loads(json.dumps(first.state)))
    assert second.adopted
    assert objective(steps_of(second.schedule)) == pytest.approx(best, abs=1e-8)
    assert all(abs(k - now[o]) <= 1 for o, k in steps_of(second.schedule).items())
    assert second.state == {"agreeing": 0}
    assert second.schedule.budget["limit"] == committed.budget["limit"] == 5 * sum(cost.values())
    assert second.schedule.budget["cost"] == flops(cost, steps_of(second.schedule)) <= second.schedule.budget["limit"]
    for o, entry in second.schedule.operators.items():
        assert entry.coefficients == matched_coefficients(entry.steps)
        assert entry.predicted_residual == pytest.approx(curves[o][entry.steps], abs=2e-9)


def test_what_improves_once_only_changes_nothing():
    committed = schedule_from_spectra(window(EARLY)[0])
    better, same = window(LATER)[0], window(EARLY)[0]
    state = next_schedule(committed, better).state
    quiet = next_schedule(committed, same, state)
    assert (quiet.adopted, quiet.improvement, quiet.state) == (False, 0.0, {"agreeing": 0})
    assert not next_schedule(committed, better, quiet.state).adopted


def test_a_refreshed_schedule_can_be_refreshed_and_keeps_where_it_comes_from():
    schedule, state, seen = schedule_from_spectra(window(EARLY)[0], provenance={"run": "run.zarr"}), None, []
    for _ in range(12):
        refresh = next_schedule(schedule, window(LATER)[0], state, provenance={"refreshed": True})
        assert refresh.schedule.budget["cost"] <= refresh.schedule.budget["limit"]
        schedule, state = refresh.schedule, refresh.state
        seen.append(refresh.adopted)
    # Every second one at most, until nothing within a step is 2 % better.
    assert seen[:2] == [False, True]
    assert not any(seen[-2:])
    assert (schedule.provenance["run"], schedule.provenance["refreshed"]) == ("run.zarr", True)


def test_matrices_the_schedule_does_not_name_are_left_out():
    spectra, _ = window(EARLY)
    committed = schedule_from_spectra(spectra.of_matrices(spectra.layer < 2))
    expected = retained_gain(spectra.of_matrices(spectra.layer < 2), committed)
    assert retained_gain(spectra, committed) == expected


def test_an_operator_without_a_spectrum_leaves_everything_as_it_is():
    committed = schedule_from_spectra(window(EARLY)[0])
    spectra, _ = window(LATER)
    gone = spectra.of_matrices(spectra.operator != "attn_v")
    assert np.isnan(retained_gain(gone, committed)).all()
    refresh = next_schedule(committed, gone, {"agreeing": 1})
    assert isinstance(refresh, Refresh)
    assert (refresh.schedule, refresh.adopted, refresh.state) == (committed, False, {"agreeing": 0})
    assert np.isnan(refresh.improvement)


FOREIGN = {
    "by hand": Schedule({"attn_q": OperatorSchedule(matched_coefficients(5), ("layers.0.attn_q.weight",), 0.0, 0.0, 0)}),
    "empty": Schedule({}),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("function", [lambda s, w: retained_gain(w, s), next_schedule])
def test_a_schedule_that_was_not_derived_is_refused(kind, function):
    with pytest.raises(ValueError, match=r"^schedule: expected one that `schedule_from_spectra` or `diag schedule` derived"):
        function(FOREIGN[kind], window(EARLY)[0])


def test_the_interim_budget_holds_where_the_schedule_in_force_costs_all_of_it():
    spectra, plain = window(EARLY)
    committed = schedule_from_spectra(spectra)
    five = replace(schedule_from_spectra(spectra, rule="uniform"), objective=committed.objective)
    curves, cost = table(plain)
    assert five.budget["cost"] == five.budget["limit"]
    refresh = next_schedule(five, spectra, {"agreeing": 1})
    assert refresh.adopted
    assert flops(cost, steps_of(refresh.schedule)) <= 5 * sum(cost.values())
    assert mean(curves, steps_of(refresh.schedule)) < mean(curves, steps_of(five))
