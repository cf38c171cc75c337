"""Residual curves against Newton–Schulz on real matrices, the iteration written out."""

from itertools import pairwise

import numpy as np
import pytest

from optiscope.analysis import residual_curves
from optiscope.diagnostics.newton_schulz.families import FAMILIES
from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients

JORDAN = (3.4445, -4.7750, 2.0315)
OPERATORS = {"attn_q": "q_proj", "attn_k": "k_proj", "mlp_up": "up_proj"}
STEPS = (3, 4, 5, 6, 7, 8)


def polar_express(k):
    published = FAMILIES["polar_express"].coefficients
    return [published[min(i, len(published) - 1)] for i in range(k)]


FIRST_STEPS = {"matched": matched_coefficients, "jordan": lambda k: [JORDAN] * k, "polar_express": polar_express}


def residual_of_matrix(sigma, shape, coefficients, rng):
    """‖I − OOᵀ‖_F/√r after the iteration on a matrix with the given singular values and random singular vectors."""
    rank = min(shape)
    left, right = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in shape)
    x = (left * sigma) @ right.T
    x = x if shape[0] <= shape[1] else x.T
    x = x / np.linalg.norm(x)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return np.linalg.norm(np.eye(rank) - x @ x.T) / np.sqrt(rank)


@pytest.mark.parametrize("family", FIRST_STEPS)
def test_curves_are_means_over_matrices(family, model, model_run):
    rng = np.random.default_rng(5)
    found = residual_curves.study(model_run, families=[family])
    assert found["k"].values.tolist() == list(STEPS)
    for operator, part in OPERATORS.items():
        for k in (3, 5, 8):
            expected = np.mean(
                [
                    residual_of_matrix(sigma, matrix["shape"], FIRST_STEPS[family](k), rng)
                    for name, matrix in model.items()
                    if part in name
                    for sigma in matrix["sigma"]
                ]
            )
            # Singular values are stored as float32: 6e-8 of each. Measured: at most 9e-8.
            assert float(found["residual"].sel(family=family, operator=operator, k=k)) == pytest.approx(expected, abs=2e-7)


def test_the_window_includes_both_ends(model, model_run, build_run):
    part = {name: {**matrix, "sigma": matrix["sigma"][1:4]} for name, matrix in model.items()}
    windowed = residual_curves.study(model_run, slice(20, 40))
    np.testing.assert_array_equal(windowed["residual"], residual_curves.study(build_run(part, steps=(20, 30, 40)))["residual"])
    assert int(windowed["snapshots"]) == 3
    assert (windowed.attrs["first_step"], windowed.attrs["last_step"]) == (20, 40)
    # Steps between records count by what lies inside.
    assert residual_curves.study(model_run, slice(15, 44))["residual"].equals(windowed["residual"])


@pytest.mark.parametrize("window", [slice(61, 100), slice(11, 19), slice(40, 20)])
def test_an_empty_window_tells_what_there_is(model_run, window):
    with pytest.raises(ValueError, match=r"^window: no spectrum recorded in that range of steps; the run's records go from 10 to 60$"):
        residual_curves.study(model_run, window)


def test_a_curve_is_convex_where_no_step_gains_more_than_the_one_before(build_run):
    easy, hard = np.linspace(1, 0.5, 4), 10.0 ** -np.linspace(0, 4, 16)
    matrices = {"layers.0.attn.q_proj.weight": {"sigma": easy}, "layers.0.attn.k_proj.weight": {"sigma": hard}}
    found = residual_curves.study(build_run(matrices))
    for family in FIRST_STEPS:
        for operator in ("attn_q", "attn_k"):
            curve = found["residual"].sel(family=family, operator=operator).values
            gains = [before - after for before, after in pairwise(curve)]
            expected = all(later <= earlier + 1e-9 for earlier, later in pairwise(gains)) and min(gains) >= 0
            assert bool(found["convex"].sel(family=family, operator=operator)) == expected
    # Four decades of singular values: the first steps lift nothing, so that the curve is S-shaped.
    assert not found["convex"].sel(family="matched", operator="attn_k")
    # Jordan's iteration does not converge, so that its curve may rise.
    assert not found["convex"].sel(family="jordan", operator="attn_q")
    assert "a greedy allocation may fail" in residual_curves.summary(found)


def test_ranks_above_64_are_read_back_from_64_values(build_run, output):
    # Geometric in the index: what lies between the stored values is then known exactly.
    sigma = 1e-3 ** (np.arange(200) / 199)
    found = residual_curves.study(build_run({"layers.0.attn.q_proj.weight": {"sigma": sigma}}))
    for k in STEPS:
        o = output(sigma / np.linalg.norm(sigma), [JORDAN] * k)
        assert float(found["residual"].sel(family="jordan", operator="attn_q", k=k)) == pytest.approx(
            np.sqrt(np.mean((1 - o**2) ** 2)), abs=1e-6
        )


def test_what_was_not_recorded_is_left_out(model, build_run):
    name = "layers.0.attn.q_proj.weight"
    never = {"layers.0.attn.o_proj.weight": {"sigma": [None] * 6, "shape": (8, 8)}}
    gappy = {**model, name: {**model[name], "sigma": [None, *model[name]["sigma"][1:]]}}
    found = residual_curves.study(build_run({**gappy, **never}, steps=range(6)))
    assert found["operator"].values.tolist() == list(OPERATORS)
    rng = np.random.default_rng(5)
    expected = [
        residual_of_matrix(sigma, (16, 16), [JORDAN] * 5, rng)
        for n, m in gappy.items()
        if "q_proj" in n
        for sigma in m["sigma"]
        if sigma is not None
    ]
    assert float(found["residual"].sel(family="jordan", operator="attn_q", k=5)) == pytest.approx(np.mean(expected), abs=2e-7)


def test_the_summary_names_the_hardest(build_run):
    matrices = {
        "layers.0.attn.q_proj.weight": {"sigma": 10.0 ** -np.linspace(0, 4, 8)},
        "layers.0.attn.k_proj.weight": {"sigma": np.linspace(1, 0.5, 8)},
    }
    found = residual_curves.study(build_run(matrices))
    mean = float(found["residual"].sel(family="matched", k=5).mean())
    assert residual_curves.summary(found).startswith(f"Mean residual after 5 steps: matched {mean:.3f}, jordan ")
    assert "Hardest operator: attn_q, " in residual_curves.summary(found)


def test_error_bars_are_those_of_a_naive_bootstrap(model, model_run, resample):
    rng = np.random.default_rng(5)
    found = residual_curves.study(model_run, families=["jordan"])
    for operator, part in OPERATORS.items():
        own = [m for name, m in model.items() if part in name]
        for k in (3, 8):
            residual = np.array([[residual_of_matrix(s, m["shape"], [JORDAN] * k, rng) for s in m["sigma"]] for m in own])
            one = found.sel(family="jordan", operator=operator, k=k)
            low, high = resample(lambda chosen, residual=residual: residual[chosen].mean(), range(3))
            assert low < high
            # As above, of the stored singular values.
            np.testing.assert_allclose([one["residual_low"], one["residual_high"]], [low, high], atol=2e-7)


def test_error_bars_draw_matrices_of_a_layer_together(build_run, resample):
    rng, layers = np.random.default_rng(6), [0, 0, 1, 2, 2]
    names = [f"layers.{layer}.{i}.q_proj.weight" for i, layer in enumerate(layers)]
    sigma = [[np.geomspace(1, 10 ** -rng.uniform(0.5, 3), 8) for _ in range(3)] for _ in layers]
    sigma[4][1] = None  # a record that is missing weighs nothing
    found = residual_curves.study(build_run({name: {"sigma": s} for name, s in zip(names, sigma, strict=True)}), families=["jordan"])
    residual = [[residual_of_matrix(s, (8, 8), [JORDAN] * 5, rng) for s in own if s is not None] for own in sigma]
    low, high = resample(lambda chosen: np.mean([r for i in chosen for r in residual[i]]), layers)
    one = found.sel(family="jordan", operator="attn_q", k=5)
    np.testing.assert_allclose([one["residual_low"], one["residual_high"]], [low, high], atol=2e-7)
    hardest = f"Hardest operator: attn_q, {float(one['residual']):.3f} (95 % {low:.3f} to {high:.3f})."
    assert hardest in residual_curves.summary(found)
