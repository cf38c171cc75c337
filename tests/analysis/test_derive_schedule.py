"""From records to a schedule: which records, what it costs, what it promises, and that it says where it comes from."""

import json

import numpy as np
import pytest

from optiscope.analysis import derive_schedule, open_run
from optiscope.analysis.scheduling import default_window
from optiscope.diagnostics import FAMILIES, Schedule, matched_coefficients
from optiscope.diagnostics.schedules.deriving import SCHEDULES

JORDAN = (3.4445, -4.7750, 2.0315)
Q = "layers.0.attn.q_proj.weight"


def window(build_run, steps, lr=0.02, **changes):
    """The default window of a run with records at `steps`, as (first, last)."""
    found = default_window(build_run({Q: {"sigma": (2.0, 1.0)}, **changes}, steps=steps, lr=lr))
    return found.start, found.stop


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 101), (20, 27)),  # after the momentum's burn-in, 8 records
        (range(10, 1001, 10), (20, 90)),
        (range(20, 4001, 5), (20, 60)),  # 1 % of the run where that is more
        (range(100, 1001, 100), (100, 800)),
        (range(50, 251, 50), (50, 250)),  # fewer records than 8: all of them
        (range(1, 16), (15, 15)),  # shorter than the burn-in: the last record, the furthest from the start
        ((7,), (7, 7)),
    ],
)
def test_the_window_begins_after_the_burn_in(build_run, steps, expected):
    assert window(build_run, steps) == expected


def test_the_window_begins_after_the_warm_up(build_run):
    steps = range(10, 1010, 10)
    warm_up = [min(1.0, step / 300) * 0.02 for step in steps]
    # 99 % of the largest learning rate is reached at step 297, hence at the record of step 300.
    assert window(build_run, steps, warm_up) == (300, 370)
    # A decay afterwards changes nothing.
    decayed = [min(step / 300, 1.0, 1.2 - step / 1000) * 0.02 for step in steps]
    assert max(decayed) < 0.02
    assert window(build_run, steps, decayed)[0] == steps[int(np.argmax(np.array(decayed) >= 0.99 * max(decayed)))]


def test_the_warm_up_is_that_of_the_orthogonalised_matrices(build_run):
    steps = range(10, 1010, 10)
    warm_up = [min(1.0, step / 300) * 0.02 for step in steps]
    other = {"lm_head.weight": {"sigma": (2.0, 1.0), "optimizer": "AdamW", "update": {"lr": 0.5}}}
    assert window(build_run, steps, warm_up, **other) == (300, 370)


def test_a_missing_learning_rate_leaves_the_burn_in(build_run):
    assert window(build_run, range(1, 101), float("nan")) == (20, 27)
    run = build_run({Q: {"sigma": (2.0, 1.0)}}, steps=range(1, 101), lr=[i / 100 for i in range(100)])
    del run["update"]
    assert (default_window(run).start, default_window(run).stop) == (20, 27)


@pytest.fixture(scope="module")
def unequal(build_run):
    """Six operators of different shapes and difficulty, in two layers, recorded at 30 steps."""
    rng = np.random.default_rng(4)
    shapes = {
        "attn.q_proj": (16, 16),
        "attn.k_proj": (8, 16),
        "attn.v_proj": (8, 16),
        "attn.o_proj": (16, 16),
        "mlp.up_proj": (48, 16),
        "mlp.down_proj": (16, 48),
    }
    decades = (4, 3, 2.5, 3, 1.5, 1)
    return build_run(
        {
            f"layers.{layer}.{operator}.weight": {
                "shape": shape, "sigma": [np.sort(10 ** -rng.uniform(0, depth, min(shape)))[::-1] for _ in range(30)],
            }
            for layer in range(2)
            for (operator, shape), depth in zip(shapes.items(), decades, strict=True)
        },
        steps=range(1, 31),
    )  # fmt: skip


def flops(rows, cols):
    """Of one step: the Gram matrix, its square, and the product with X; a product of m×k and k×n is 2mkn."""
    r, q = min(rows, cols), max(rows, cols)
    return 2 * r * q * r + 2 * r * r * r + 2 * r * r * q


def residuals(run, operator, coefficients, output, steps):
    """Mean residual of an operator's matrices over a range of recorded steps, from the spectra as stored (ranks below 64)."""
    geometry = run["geometry"].to_dataset().sel(step=steps)
    found = []
    for j, name in enumerate(geometry["operator"].values.tolist()):
        if name == operator:
            rank = min(int(geometry["rows"][j]), int(geometry["cols"][j]))
            for stored in geometry["sigma_quantile"].values[:, j].astype(float):
                # All singular values are stored, repeated to fill 64: the distinct ones.
                x = np.unique(stored)
                assert len(x) == rank
                found.append(np.sqrt(np.mean((1 - output(x, coefficients) ** 2) ** 2)))
    return np.mean(found)


@pytest.mark.parametrize("budget", [4, 5, 6])
@pytest.mark.parametrize("rule", ["mean", "mean-uncapped", "minimax", "uniform"])
def test_budget_and_cap_are_kept(unequal, rule, budget):
    found = derive_schedule(unequal, budget=budget, rule=rule)
    geometry = unequal["geometry"].to_dataset()
    cost = {
        name: flops(m, n)
        for name, m, n in zip(geometry["name"].values.tolist(), geometry["rows"].values, geometry["cols"].values, strict=True)
    }
    assert sorted(name for entry in found.operators.values() for name in entry.matrices) == sorted(cost)
    for entry in found.operators.values():
        assert entry.cost == sum(cost[name] for name in entry.matrices) * entry.steps
    assert found.budget["limit"] == sum(cost.values()) * budget
    assert found.budget["cost"] == sum(entry.cost for entry in found.operators.values()) <= found.budget["limit"]
    predicted = [entry.predicted_residual for entry in found.operators.values()]
    baseline = [entry.baseline_residual for entry in found.operators.values()]
    objective = found.objective
    # Two matrices of each operator: plain means.
    assert objective["mean_residual"] == pytest.approx(np.mean(predicted), abs=1e-12)
    assert objective["baseline_mean_residual"] == pytest.approx(np.mean(baseline), abs=1e-12)
    assert (objective["max_residual"], objective["baseline_max_residual"]) == (max(predicted), max(baseline))
    if rule != "mean-uncapped":
        assert max(predicted) <= max(baseline)
    if rule in ("mean", "mean-uncapped"):
        assert objective["lower_bound"] - 1e-9 <= objective["mean_residual"] < objective["baseline_mean_residual"]
    else:
        assert objective["lower_bound"] is None


@pytest.mark.parametrize(
    ("family", "coefficients"),
    [
        ("matched", matched_coefficients),
        ("jordan", lambda k: (JORDAN,) * k),
        ("polar_express", lambda k: FAMILIES["polar_express"].coefficients[:k]),
    ],
)
def test_coefficients_are_the_familys_and_residuals_follow_from_them(unequal, output, family, coefficients):
    found = derive_schedule(unequal, family=family)
    # A prefix of a list designed for more steps is so poor that no step can be taken away: uniform remains.
    assert (len({entry.steps for entry in found.operators.values()}) == 1) == (family == "polar_express")
    first, last = found.provenance["window"]
    for operator, entry in found.operators.items():
        assert entry.coefficients == tuple(coefficients(entry.steps))
        # Residuals are rounded to 1e-9, so that ties are ties.
        assert entry.predicted_residual == pytest.approx(
            residuals(unequal, operator, entry.coefficients, output, slice(first, last)), abs=2e-9
        )
        assert entry.baseline_residual == pytest.approx(residuals(unequal, operator, coefficients(5), output, slice(first, last)), abs=2e-9)


def test_what_was_in_force_is_told(unequal, output):
    found = derive_schedule(unequal, window=slice(10, 12))
    in_force = np.mean([residuals(unequal, operator, (JORDAN,) * 5, output, slice(10, 12)) for operator in found.operators])
    # Predicted residuals are stored as float32.
    assert found.objective["in_force_mean_residual"] == pytest.approx(in_force, rel=1e-6)


def test_provenance_says_where_it_comes_from(unequal, recorded):
    found = derive_schedule(unequal, window=slice(7, 10), rule="minimax", budget=6)
    provenance = found.provenance
    assert (provenance["window"], provenance["snapshots"], provenance["family"]) == ([7, 10], 4, "matched")
    assert provenance["run_created"] == "2026-01-01T00:00:00+00:00"
    assert (found.budget["kind"], found.budget["mean_steps"], found.objective["rule"]) == ("flop", 6, "minimax")
    assert "‖I − OOᵀ‖_F/√r" in provenance["residual"]
    real = derive_schedule(open_run(recorded)).provenance
    assert real["run"] == str(recorded)
    assert real.keys() == provenance.keys()
    assert all(real.values())


def test_what_bfloat16_cannot_carry_is_told(build_run):
    # The noise of rounding a 4×8 matrix to bfloat16 has the spectral norm 0.425·2⁻⁸(1/√4 + 1/√8)‖M‖_F = 1.4e-3.
    known, lost = (1.0, 0.5, 0.1, 0.01), (1.0, 0.5, 0.1, 1e-4)
    run = build_run(
        {
            "layers.0.attn.q_proj.weight": {"sigma": [known, lost, lost], "shape": (4, 8)},
            "layers.1.attn.q_proj.weight": {"sigma": [known, None, lost], "shape": (4, 8)},
            "layers.0.attn.k_proj.weight": {"sigma": known, "shape": (4, 8)},
        },
        steps=(1, 2, 3),
    )
    # One of four values, in three of the five spectra of attn_q.
    assert derive_schedule(run, window=slice(1, 3)).provenance["below_bfloat16_floor"] == {"attn_q": 3 / 5 / 4, "attn_k": 0}
    assert derive_schedule(run, window=slice(1, 1)).provenance["below_bfloat16_floor"] == {"attn_q": 0, "attn_k": 0}


def test_a_schedule_survives_its_file(unequal, tmp_path):
    found = derive_schedule(unequal)
    found.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == found
    # Plain JSON, without the NaN and Infinity that Python would write.
    json.loads((tmp_path / "schedule.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_the_same_run_gives_the_same_schedule(unequal):
    first, second = derive_schedule(unequal), derive_schedule(unequal)
    assert (first.operators, first.budget, first.objective) == (second.operators, second.budget, second.objective)


def test_operators_without_a_spectrum_in_the_window_are_left_out(build_run):
    late = {"layers.0.attn.k_proj.weight": {"sigma": [None, None, (3.0, 1.0)]}}
    run = build_run({Q: {"sigma": (2.0, 1.0)}, **late}, steps=(1, 2, 3))
    assert list(derive_schedule(run, window=slice(1, 2)).operators) == ["attn_q"]
    assert list(derive_schedule(run, window=slice(1, 3)).operators) == ["attn_q", "attn_k"]


BAD = {
    "rule: expected one of mean, mean-uncapped, minimax, uniform, kappa, got 'best'": {"rule": "best"},
    "split: expected one of auto, never, got 'always'": {"split": "always"},
    f"family: expected one of {', '.join(SCHEDULES)}, got 'aol_flash'": {"family": "aol_flash"},
    "budget: expected a step count of 3 to 8, got 9": {"budget": 9},
    "budget: expected a step count of 3 to 8, got 2": {"budget": 2},
    "window: no spectrum recorded in that range of steps; the run's records go from 1 to 30": {"window": slice(31, 40)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(unequal, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        derive_schedule(unequal, **BAD[message])
    assert str(caught.value) == message


def test_a_run_without_orthogonalisation_has_nothing_to_schedule(build_run):
    with pytest.raises(ValueError, match=r"^run: no optimizer in it orthogonalises"):
        derive_schedule(build_run({Q: {"sigma": (2.0, 1.0), "optimizer": "AdamW"}}))


def test_every_family_has_a_design_for_every_count():
    for family, design in SCHEDULES.items():
        for k in range(3, 9):
            assert len(design(k)) == k, family


@pytest.mark.parametrize("family", ["cubic", "cubic5"])
def test_cubic_steps_take_two_products(unequal, family):
    found = derive_schedule(unequal, family=family, rule="uniform")
    shapes = {"attn_q": (16, 16), "attn_k": (8, 16), "mlp_up": (16, 48)}
    for operator, (r, q) in shapes.items():
        assert found.operators[operator].cost == 2 * 5 * (2 * r * q * r + 2 * r * r * q)  # two matrices, five steps


def test_condition_numbers_are_weighed_by_the_familys_own_slope(unequal):
    """Cubic steps raise small values by 1.5 each, so that a decade of κ is worth 5.7 of them instead of 1.7: steps spread to both ends."""
    spread = {
        family: [e.steps for e in derive_schedule(unequal, family=family, rule="kappa", keep_uniform=False).operators.values()]
        for family in ("cubic", "matched")
    }
    assert np.ptp(spread["cubic"]) > np.ptp(spread["matched"])
