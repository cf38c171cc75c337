"""Update sizes: the identity a² = mean o² on real matrices, its split, and the one factor that must be found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiscope.analysis import rms_alignment

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
CUBIC = ((1.5, -0.5, 0.0),) * 3


def newton_schulz(m, coefficients):
    """The iteration as Muon runs it, in float64."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / np.linalg.norm(x)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def rms(array):
    return np.sqrt(np.mean(array**2))


def run_of_updates(build_run, shapes, scale, schedule=JORDAN):
    """A run whose update sizes are those of real matrices: ΔW/η = scale(rows, cols)·O; and a of each."""
    rng = np.random.default_rng(11)
    matrices, expected = {}, []
    for layer, (shape, target) in enumerate(shapes):
        m = rng.standard_normal(shape)
        o = newton_schulz(m, schedule)
        per_lr = rms(scale(*shape) * o)
        expected.append(per_lr / target)
        matrices[f"layers.{layer}.attn.q_proj.weight"] = {
            "shape": shape, "sigma": np.linalg.svd(m, compute_uv=False), "target": target, "update": {"update_rms_per_lr": per_lr},
        }  # fmt: skip
    return build_run(matrices, schedules=(schedule,)), np.array(expected)


SHAPES = ((96, 256), (64, 64), (100, 40), (20, 60))


@pytest.mark.parametrize("schedule", [JORDAN, CUBIC])
@pytest.mark.parametrize(
    ("scale", "target"),
    [
        (lambda m, n: 0.2 * np.sqrt(max(m, n)), lambda m, n: 0.2),  # match_rms_adamw
        (lambda m, n: np.sqrt(max(1, m / n)), lambda m, n: 1 / np.sqrt(n)),  # torch's original
    ],
)
def test_alignment_is_the_rms_of_the_outputs_singular_values(build_run, scale, target, schedule):
    run, expected = run_of_updates(build_run, [(shape, target(*shape)) for shape in SHAPES], scale, schedule)
    found = rms_alignment.study(run)
    np.testing.assert_allclose(found["alignment"], [expected] * 3, rtol=1e-12)
    # a² − 1 = mean(o² − 1): the spectrum alone predicts it. Values between the 64 stored ones are interpolated from rank
    # 65 on: measured 4e-5 for the Gaussian 96×256 and 5e-9 otherwise.
    square = found["under_lifted"].values + found["band"].values
    np.testing.assert_allclose(square, [expected**2 - 1] * 3, atol=1e-4)
    np.testing.assert_allclose(square[:, 1:], [expected[1:] ** 2 - 1] * 3, atol=1e-7)
    # Jensen: |mean(o² − 1)| ≤ √mean((o² − 1)²).
    assert (np.abs(expected**2 - 1) <= found["residual"].values + 1e-6).all()
    assert not found["off_target"].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=80), st.sampled_from([JORDAN, CUBIC, ()]), st.sampled_from([0.2, 1 / 8, 3.0]))
def test_no_spectrum_puts_a_correct_update_off_target(build_run, sigma, schedule, target):
    sigma = np.sort(sigma)[::-1]
    run = build_run({"layers.0.attn.q_proj.weight": {"sigma": sigma, "target": target}}, schedules=(schedule,), steps=(1,))
    found = rms_alignment.study(run)
    a, residual = float(found["alignment"][0, 0]), float(found["residual"][0, 0])
    assert abs(a**2 - 1) <= residual * (1 + 1e-6) + 1e-6
    assert not found["off_target"].any()
    if len(sigma) <= 64:
        assert float((found["under_lifted"] + found["band"])[0, 0]) == pytest.approx(a**2 - 1, abs=1e-6)


def test_under_lifted_counts_outputs_below_a_half(build_run, output):
    sigma = np.array([1.0, 0.9, 0.8, 1e-3, 1e-5])
    found = rms_alignment.study(build_run({"layers.0.attn.q_proj.weight": {"sigma": sigma}}))
    o = output(sigma / np.linalg.norm(sigma), JORDAN)
    assert (o[:3] > 0.6).all()
    assert 0.2 < o[3] < 0.4
    assert o[4] < 0.01
    np.testing.assert_allclose(found["under_lifted"], sum(v**2 - 1 for v in o[3:]) / 5, atol=1e-7)
    np.testing.assert_allclose(found["band"], sum(v**2 - 1 for v in o[:3]) / 5, atol=1e-7)


def test_the_factor_of_one_adamuon_is_found(build_run):
    """One published AdaMuon multiplies by √max(rows, cols) without having aligned the RMS first: 3.2 in place of 0.2."""
    shape = (96, 256)
    run, expected = run_of_updates(build_run, [(shape, 0.2)], lambda m, n: 0.2 * max(m, n))
    found = rms_alignment.study(run)
    assert found["off_target"].all()
    right, a = run_of_updates(build_run, [(shape, 0.2)], lambda m, n: 0.2 * np.sqrt(max(m, n)))
    assert not rms_alignment.study(right)["off_target"].any()
    assert expected[0] / a[0] == pytest.approx(np.sqrt(256), rel=1e-12)
    assert float(found["alignment"][0, 0]) == pytest.approx(16, rel=0.2)


@pytest.mark.parametrize(("factor", "off"), [(0.2, True), (0.9, False), (1.0, False), (1.1, False), (1.4, True), (16.0, True)])
def test_off_target_begins_where_the_residual_ends(build_run, output, factor, off):
    sigma = np.linspace(1, 0.3, 12)
    run = build_run({"layers.0.attn.q_proj.weight": {"sigma": sigma, "size": factor}})
    o = output(sigma / np.linalg.norm(sigma), JORDAN)
    a, residual = factor * np.sqrt(np.mean(o**2)), np.sqrt(np.mean((1 - o**2) ** 2))
    # Two per cent of slack are allowed; none of the factors is that close to a limit.
    limits = np.sqrt(1 - residual), np.sqrt(1 + residual)
    assert min(abs(a / limit - 1) for limit in limits) > 0.03
    assert off == (not limits[0] < a < limits[1])
    assert rms_alignment.study(run)["off_target"].values.all() == off


def test_sizes_against_adamw(build_run):
    matrices = {
        "layers.0.attn.q_proj.weight": {"sigma": np.ones(4), "target": 0.25},
        "layers.0.attn.k_proj.weight": {"sigma": np.ones(4), "optimizer": "AdamW", "size": 1.5},
    }
    found = rms_alignment.study(build_run(matrices, schedules=(CUBIC * 10,)))
    np.testing.assert_allclose(found["to_adamw"], [[1.25, 1.5]] * 3, rtol=1e-12)
    # What does not orthogonalise has no target to be off.
    assert np.isnan(found["alignment"][:, 1]).all()
    assert np.isnan(found["residual"][:, 1]).all()
    assert not found["off_target"].any()
    assert "AdamW 1.50, Muon 1.25" in rms_alignment.summary(found)


def test_missing_records_stay_missing(build_run, output):
    sigma = np.linspace(1, 0.3, 12)
    matrices = {
        "layers.0.attn.q_proj.weight": {"sigma": [sigma, None, sigma]},
        "layers.0.attn.k_proj.weight": {"sigma": [None] * 3, "shape": (4, 4)},
    }
    found = rms_alignment.study(build_run(matrices))
    a = np.sqrt(np.mean(output(sigma / np.linalg.norm(sigma), JORDAN) ** 2))
    np.testing.assert_allclose(found["alignment"], [[a, np.nan], [np.nan, np.nan], [a, np.nan]], rtol=1e-12)
    assert np.isfinite(found["residual"]).values.tolist() == [[True, False], [False, False], [True, False]]
    assert not found["off_target"].any()


def test_a_run_continued_with_other_groups_is_joined_by_step_and_name(build_run):
    sigma = {"layers.0.attn.q_proj.weight": np.linspace(1, 0.3, 12), "layers.0.attn.k_proj.weight": np.linspace(1, 0.1, 12)}
    run = build_run({name: {"sigma": s} for name, s in sigma.items()}, steps=(10, 20, 30, 40))
    whole = rms_alignment.study(run)["residual"].values
    run["geometry"] = run["geometry"].to_dataset().isel(step=[1, 3], matrix=[1, 0])
    run["update"] = run["update"].to_dataset().isel(step=[0, 1, 2])
    found = rms_alignment.study(run)["residual"].values
    np.testing.assert_array_equal(found, np.where([[False], [True], [False]], whole[:3], np.nan))


def test_without_geometry_sizes_remain(build_run):
    run = build_run({"layers.0.attn.q_proj.weight": {"sigma": np.ones(4)}})
    whole = rms_alignment.study(run)
    del run["geometry"]
    found = rms_alignment.study(run)
    assert found["alignment"].equals(whole["alignment"])
    assert np.isnan(found["residual"]).all()
    assert not found["off_target"].any()


def test_what_is_computed_does_not_carry_the_texts_of_what_it_came_from(recorded):
    from optiscope.analysis import open_run

    found = rms_alignment.study(open_run(recorded))
    assert {name: variable.attrs for name, variable in found.data_vars.items()} == {name: {} for name in found.data_vars}


def test_intended_update_is_judged_where_weights_are_too_coarse(build_run, output):
    """bfloat16 weights: the applied update is mostly rounding; the intended one, where the run has it, is right or off by 16."""
    sigma = np.linspace(1, 0.3, 12)
    size = 0.2 * np.sqrt(np.mean(output(sigma / np.linalg.norm(sigma), JORDAN) ** 2))
    name = "layers.0.attn.q_proj.weight"
    for intended, a, off in ((size, size / 0.2, False), (16 * size, 16 * size / 0.2, True), (np.nan, 5 * size / 0.2, False)):
        coarse = {"update_noise": 0.8, "update_rms_per_lr": 5 * size, "update_rms_intended": intended}
        found = rms_alignment.study(build_run({name: {"sigma": sigma, "update": coarse}}))
        np.testing.assert_allclose(found["alignment"], a, rtol=1e-12)
        assert found["off_target"].values.all() == off
    # A run from before the intended update was recorded.
    run = build_run({name: {"sigma": sigma}})
    before = rms_alignment.study(run)
    run["update"] = run["update"].to_dataset().drop_vars(["update_rms_intended", "changed_outside"])
    assert rms_alignment.study(run).identical(before)


def test_error_bars_are_those_of_a_naive_bootstrap(build_run, resample):
    rng, layers = np.random.default_rng(4), range(5)
    sizes = {part: rng.uniform(0.7, 1.3, (3, 5)) for part in ("attn.q_proj", "mlp.up_proj")}
    matrices = {
        f"layers.{layer}.{part}.weight": {"sigma": np.ones(4), "target": 0.25, "optimizer": "Muon" if part == "attn.q_proj" else "AdamW"}
        for part in sizes
        for layer in layers
    }
    per_lr = 0.2 * np.concatenate(list(sizes.values()), axis=1)
    run = build_run(matrices, groups={"update": {"update_rms_per_lr": per_lr}})
    found = rms_alignment.study(run)
    for operator, optimizer, part in (("attn_q", "Muon", "attn.q_proj"), ("mlp_up", "AdamW", "mlp.up_proj")):
        own = np.median(0.2 * sizes[part], axis=0)
        bars = np.array([*resample(lambda chosen, own=own: np.median(own[chosen]), layers), np.median(own)])
        for name, factor in (("median_update_rms_per_lr", 1.0), ("median_to_adamw", 5.0)):
            one = found.sel(of_operator=operator, of_optimizer=optimizer)
            np.testing.assert_allclose([one[f"{name}_low"], one[f"{name}_high"], one[name]], factor * bars, rtol=1e-12)
        if optimizer == "Muon":
            one = found.sel(of_operator=operator)
            for name in ("median_alignment", "overall_alignment"):
                np.testing.assert_allclose([one[f"{name}_low"], one[f"{name}_high"], one[name]], bars / 0.25, rtol=1e-12)
            told = "{2:.2f} (95 % {0:.2f} to {1:.2f})"
            assert f"Muon {told.format(*(5 * bars))}." in rms_alignment.summary(found)
            assert f"updates have {told.format(*(bars / 0.25))} times" in rms_alignment.summary(found)
    # What does not orthogonalise has no alignment.
    assert np.isnan(found["median_alignment"].sel(of_operator="mlp_up"))
