"""From spectra to a schedule: what it says about its own certainty, about noise and about depth, and what it does about it."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients
from optiscope.diagnostics.newton_schulz.recorded_spectra import RecordedSpectra
from optiscope.diagnostics.schedules import allocation, deriving
from optiscope.diagnostics.schedules.deriving import schedule_from_spectra
from optiscope.diagnostics.schedules.schedule_file import Schedule
from optiscope.diagnostics.spectra.spectrum_sketch import sketch

# The worked example: 28 layers of a Qwen3-0.6B, s_i = 10^(−L((i−1)/(r−1))^γ), L = μ + 0.25·N(0,1) + 0.3·cos(2πl/28), γ = e^(0.35·N(0,1)).
SHAPES = {
    "attn_q": (2048, 1024), "attn_k": (1024, 1024), "attn_v": (1024, 1024), "attn_o": (1024, 2048),
    "mlp_gate": (3072, 1024), "mlp_up": (3072, 1024), "mlp_down": (1024, 3072),
}  # fmt: skip
MU = (3.6, 3.5, 4.4, 3.2, 3.0, 2.8, 2.3)


def spectra(decades, shapes, *, records=1, gamma=None, scale=1):
    """Spectra of so many decades per (layer, operator), shape (layers, operators, records)."""
    decades = np.asarray(decades, float)
    layers, operators = decades.shape[:2]
    decades = np.broadcast_to(decades.reshape(layers, operators, -1), (layers, operators, records))
    gamma = np.ones((layers, operators)) if gamma is None else gamma
    rows, stored = [], []
    for layer in range(layers):
        for g, (operator, (m, n)) in enumerate(shapes.items()):
            rank = min(m, n) // scale
            place = (np.arange(rank) / (rank - 1)) ** gamma[layer, g]
            values = [10 ** (-decades[layer, g, t] * place) for t in range(records)]
            stored.append([sketch(s / np.linalg.norm(s)) for s in values])
            rows.append((f"layers.{layer}.{operator}.weight", operator, layer, m // scale, n // scale))
    name, operator, layer, m, n = (np.array(column) for column in zip(*rows, strict=True))
    values = np.array(stored).transpose(1, 0, 2)
    return RecordedSpectra(name, operator, layer, m, n, 10 * np.arange(1, records + 1), values, np.full(values.shape[:2], 0.5))


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    draws = [
        (mu + 0.25 * rng.standard_normal() + 0.3 * np.cos(2 * np.pi * layer / 28), np.exp(0.35 * rng.standard_normal()))
        for layer in range(28)
        for mu in MU
    ]
    decades, gamma = np.array(draws).reshape(28, 7, 2).transpose(2, 0, 1)
    return spectra(decades, SHAPES, gamma=gamma)


def steps_of(schedule):
    return [entry.steps for entry in schedule.operators.values()]


@pytest.mark.parametrize(
    ("rule", "family", "expected"),
    [
        ("mean", "matched", ([5, 7, 8, 6, 4, 4, 4], 0.4378, 0.6349)),
        ("kappa", "matched", ([6, 6, 7, 5, 5, 4, 4], 0.4696, 0.6114)),
        ("mean", "jordan", ([5, 8, 5, 6, 4, 4, 5], 0.5883, 0.7371)),
    ],
)
def test_the_worked_example_from_its_spectra(example, rule, family, expected):
    found = schedule_from_spectra(example, rule=rule, family=family)
    assert steps_of(found) == expected[0]
    # 64 of 1024 singular values are stored. Measured: 4e-5.
    assert found.objective["mean_residual"] == pytest.approx(expected[1], abs=2e-4)
    assert found.objective["max_residual"] == pytest.approx(expected[2], abs=2e-4)
    assert not found.objective["kept_uniform"]
    assert found.objective["choice"]["gain_interval"][0] > 0
    # No operator's halves differ more than operators do.
    assert list(found.operators) == list(SHAPES)


def test_every_operator_says_the_shapes_it_was_derived_from():
    """Each once, also of an operator with several; so does what a later look finds."""
    window = spectra([[2.0, 3.0]] * 4, {"attn_q": (64, 32), "mlp_up": (96, 32)})
    wider = window.name == "layers.3.mlp_up.weight"
    window = replace(window, rows=np.where(wider, 128, window.rows))
    found = schedule_from_spectra(window, split="never")
    assert {name: entry.shapes for name, entry in found.operators.items()} == {"attn_q": ((64, 32),), "mlp_up": ((96, 32), (128, 32))}


def test_part_of_the_worked_examples_gain_is_noise(example):
    found = schedule_from_spectra(example)
    # 27 % of attn_v's singular values lie below bfloat16's noise, as published.
    assert found.provenance["below_bfloat16_floor"]["attn_v"] == pytest.approx(0.27, abs=5e-3)
    assert 0 < found.objective["choice"]["recoverable_share"] < 0.5
    # What the same cap leaves to gain where that noise does not count: nothing.
    over = schedule_from_spectra(example, recoverable=True)
    assert steps_of(over) == [5] * 7
    assert over.objective["mean_residual"] == pytest.approx(found.objective["choice"]["mean_residuals"]["recoverable"]["uniform"], abs=1e-9)


def test_the_recoverable_share_is_a_sum_over_single_values():
    """ε̃_u − ε̃_c = Σ_i [(1 − u_i²)² − (1 − c_i²)²]/(r(ε̃_u + ε̃_c)): every singular value's part, of 48 that are stored whole."""
    shapes = {"attn_q": (48, 48), "attn_v": (48, 64), "mlp_up": (96, 48)}
    rng = np.random.default_rng(0)
    window = spectra(np.array([3.0, 3.5, 1.0])[None, :, None] + 0.4 * rng.standard_normal((4, 3, 5)), shapes, records=5)
    found = schedule_from_spectra(window, rule="mean-uncapped", split="never")
    whole = above = 0.0
    recoverable = {"uniform": [], "choice": []}
    for j, (operator, m, n) in enumerate(zip(window.operator, window.rows, window.cols, strict=True)):
        for t in range(5):
            x = np.unique(window.stored[t, j])
            assert len(x) == 48
            terms = {}
            for name, k in (("uniform", 5), ("choice", found.objective["choice"]["steps"][operator])):
                o = x
                for a, b, c in matched_coefficients(k):
                    o = a * o + b * o**3 + c * o**5
                terms[name] = (1 - o**2) ** 2
            carried = x >= 0.425 / 256 * (m**-0.5 + n**-0.5)
            parts = (terms["uniform"] - terms["choice"]) / sum(np.sqrt(e.mean()) for e in terms.values())
            whole, above = whole + parts.sum(), above + parts[carried].sum()
            for name, e in terms.items():
                recoverable[name].append(np.sqrt(e[carried].mean()))
    # All operators have as many matrices and records: plain sums and means. Curves are rounded to 1e-9.
    assert whole / (12 * 5 * 48) == pytest.approx(found.objective["choice"]["gain"], abs=1e-8)
    assert found.objective["choice"]["recoverable_share"] == pytest.approx(above / whole, rel=1e-9)
    assert 0.1 < above / whole < 0.9
    for name, values in recoverable.items():
        assert found.objective["choice"]["mean_residuals"]["recoverable"][name] == pytest.approx(np.mean(values), rel=1e-9)


TWO = {"attn_q": (32, 32), "mlp_up": (32, 96)}


def one_layer_decides():
    """Six layers of two operators: in one of them the first gains much by more steps, in the others the second loses by fewer."""
    decades = np.tile([1.0, 2.0], (6, 1))
    decades[0] = [4.5, 0.5]
    return spectra(decades, TWO)


def test_an_uncertain_gain_leaves_equal_steps_in_force(tmp_path):
    window = one_layer_decides()
    kept, taken = (schedule_from_spectra(window, rule="mean-uncapped", split="never", keep_uniform=keep) for keep in (True, False))
    choice = kept.objective["choice"]
    assert choice["gain"] > 0
    assert choice["gain_interval"][0] <= 0 < choice["gain_interval"][1]
    assert kept.objective["kept_uniform"]
    assert steps_of(kept) == [5, 5]
    assert kept.objective["mean_residual"] == kept.objective["baseline_mean_residual"]
    assert kept.budget["cost"] == kept.budget["limit"]
    # What the rule would have chosen is told, and is what is held when asked for.
    assert not taken.objective["kept_uniform"]
    assert dict(zip(taken.operators, steps_of(taken), strict=True)) == choice["steps"]
    assert steps_of(taken) != [5, 5]
    assert taken.objective["choice"] == choice
    assert taken.objective["mean_residual"] == pytest.approx(kept.objective["mean_residual"] - choice["gain"], abs=1e-12)
    for schedule in (kept, taken):
        schedule.save(tmp_path / "schedule.json")
        assert Schedule.load(tmp_path / "schedule.json") == schedule
        json.loads((tmp_path / "schedule.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_of_two_layers_no_interval_is_drawn_and_the_rules_choice_stands():
    window = one_layer_decides()
    found = schedule_from_spectra(window.of_matrices(window.layer < 2), rule="mean-uncapped")
    choice = found.objective["choice"]
    assert (choice["gain_interval"], choice["relative_gain_interval"], found.objective["kept_uniform"]) == (None, None, False)
    assert steps_of(found) != [5, 5]
    assert all(entry.baseline_interval is None for entry in found.operators.values())


def test_an_operator_whose_halves_differ_gets_two_entries(tmp_path):
    """Operators of the same mean difficulty, one of which is easy in early layers and hard in late ones."""
    decades = np.full((8, 2), 2.5)
    decades[:4, 0], decades[4:, 0] = 1.0, 4.0
    window = spectra(decades, TWO)
    found = schedule_from_spectra(window, rule="mean-uncapped")
    assert list(found.operators) == ["attn_q:0-3", "attn_q:4-7", "mlp_up"]
    assert found.operators["attn_q:4-7"].matrices == tuple(f"layers.{layer}.attn_q.weight" for layer in range(4, 8))
    assert sorted(name for entry in found.operators.values() for name in entry.matrices) == sorted(window.name.tolist())
    # FLOPs of a step of a 32×32 matrix, 2(2r²q + r³), times four of them.
    assert found.operators["attn_q:0-3"].cost == 4 * 6 * 32**3 * found.operators["attn_q:0-3"].steps
    # log κ = 1 and 4 in the halves: (1.5² + 1.5²)/1; both operators have the mean 2.5.
    variances = found.provenance["depth"]["variances"]["attn_q"]
    assert variances["between_halves"] == pytest.approx(4.5)
    assert variances["between_operators"] == pytest.approx(0, abs=1e-12)
    assert set(found.provenance["below_bfloat16_floor"]) == set(found.operators)
    found.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == found
    whole = schedule_from_spectra(window, rule="mean-uncapped", split="never")
    assert list(whole.operators) == ["attn_q", "mlp_up"]
    assert whole.provenance["depth"]["variances"] == found.provenance["depth"]["variances"]
    # What it is for: less residual than one step count for both halves can leave.
    assert found.objective["mean_residual"] < whole.objective["mean_residual"] - 0.01


def test_too_many_operators_are_refused_before_they_are_looked_at(example, monkeypatch):
    many = replace(example, operator=example.name)  # 196 of them
    monkeypatch.setattr(allocation, "MAX_GROUPS", 195)
    monkeypatch.setattr(deriving, "depth_halves", None)  # what takes time that grows with their square
    with pytest.raises(ValueError, match="expected at most 195 to give steps to, got 196"):
        schedule_from_spectra(many)


def permuted(window, rng, *, equal_cost):
    """Spectra given to other matrices at random; shapes, hence costs, stay with the operators, or are made equal."""
    window = replace(window, stored=window.stored[:, rng.permutation(len(window.name))])
    return replace(window, rows=np.full_like(window.rows, 32), cols=np.full_like(window.cols, 32)) if equal_cost else window


def test_permuted_operators_keep_equal_steps():
    """The null of the rule: with spectra dealt out at random there is nothing to gain by operator, and equal steps stay in force.

    Not without the cap: operators that cost less then get the steps of those that cost more, a gain by price, which no permutation takes away
    and no interval over layers tells from one by geometry.
    """
    rng = np.random.default_rng(1)
    decades = np.array(MU) + 0.4 * rng.standard_normal((12, 7))
    window = spectra(decades, SHAPES, scale=32)
    real = schedule_from_spectra(window).objective
    assert real["choice"]["gain_interval"][0] > 0
    uncertain, by_price, without_price = 0, 0, 0
    for _ in range(20):
        other = permuted(window, rng, equal_cost=False)
        uncertain += schedule_from_spectra(other, split="never").objective["choice"]["gain_interval"][0] <= 0
        by_price += schedule_from_spectra(other, split="never", rule="mean-uncapped").objective["choice"]["gain_interval"][0] > 0
        other = permuted(window, rng, equal_cost=True)
        without_price += schedule_from_spectra(other, split="never", rule="mean-uncapped").objective["choice"]["gain_interval"][0] > 0
    assert uncertain >= 19
    assert by_price >= 19
    assert without_price <= 5


def test_the_same_window_comes_to_the_same_digits():
    """Whether the records came one by one in a training or are read as a whole: float32 in, the same bits out."""
    rng = np.random.default_rng(3)
    window = spectra(2.5 + rng.standard_normal((5, 2, 12)), TWO, records=12)
    window = replace(window, stored=window.stored.astype(np.float32))
    one_by_one = [window.of_records([t]) for t in range(12)]
    joined = replace(
        one_by_one[0],
        step=np.concatenate([w.step for w in one_by_one]),
        stored=np.concatenate([w.stored for w in one_by_one]),
        in_force=np.concatenate([w.in_force for w in one_by_one]),
    )
    strided = replace(window, stored=np.asfortranarray(window.stored))
    first, *others = (schedule_from_spectra(w).to_json().split('"created"') for w in (window, joined, strided))
    for other in others:
        assert other[0] == first[0]
        assert other[1][40:] == first[1][40:]


def test_every_step_count_is_a_budget():
    window = one_layer_decides()
    costs = [schedule_from_spectra(window, budget=k, rule="uniform").budget["cost"] for k in range(3, 9)]
    assert np.ptp([b - a for a, b in pairwise(costs)]) == 0
    for k in (2, 9):
        with pytest.raises(ValueError, match=f"^budget: expected a step count of 3 to 8, got {k}$"):
            schedule_from_spectra(window, budget=k)


def test_a_window_without_a_spectrum_is_refused():
    window = one_layer_decides()
    with pytest.raises(ValueError, match=r"^window: no spectrum recorded in it; let it hold at least one record"):
        schedule_from_spectra(replace(window, stored=np.full_like(window.stored, np.nan)))
