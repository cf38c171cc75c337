"""Everything measured on one step, for steps made by hand in float64 whose answers are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from optiscope.diagnostics.adam_mini import row_blocks
from optiscope.diagnostics.catalogue import NS_STEPS, in_group
from optiscope.diagnostics.ns_families import JORDAN
from optiscope.diagnostics.observation import (
    READABLE_NOISE,
    NewtonSchulz,
    Observation,
    measure_geometry,
    measure_second_moment,
    measure_second_moment_map,
    measure_update,
)
from optiscope.diagnostics.second_moment import Moments
from optiscope.diagnostics.spectrum_sketch import unsketch

LR, DECAY = 0.02, 0.5
DOUBLE, SINGLE, BFLOAT16 = 2.0**-53, 2.0**-24, 2.0**-8
JORDAN_5 = NewtonSchulz((JORDAN,) * 5, eps=1e-7)


def gaussian(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols))


def iterate(matrix, coefficients, eps=1e-7):
    """Naive Newton–Schulz of a wide matrix in float64."""
    x = matrix / max(np.linalg.norm(matrix), eps)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def adamw_step():
    """The first AdamW step with ε = 0: m̂/√v̂ = sign(g), so every weight 1 moves by η(λ + 1), all gradients being positive."""
    before, gradient = np.ones((4, 6)), np.abs(gaussian(4, 6))
    beta_1, beta_2 = 0.9, 0.999
    first, second = (1 - beta_1) * gradient, (1 - beta_2) * gradient**2
    after = before * (1 - LR * DECAY) - LR * (first / (1 - beta_1)) / np.sqrt(second / (1 - beta_2))
    return Observation(
        before, after, DOUBLE, grad_rms=float(np.sqrt((gradient**2).mean())), momentum_rms=float(np.sqrt((first**2).mean())),
        lr=LR, weight_decay=DECAY, decoupled_decay=DECAY, ns_input=gradient, ns_roundoff=DOUBLE,
    )  # fmt: skip


def muon_step(rows=32, cols=64, weight_scale=0.02, scale=2.0):
    """One Muon step, W ← W(1 − ηλ) − η·s·O with O = NS(M), all in float64."""
    before, momentum = weight_scale * gaussian(rows, cols, 1), gaussian(rows, cols, 2)
    after = before * (1 - LR * DECAY) - LR * scale * iterate(momentum, (JORDAN,) * 5)
    return Observation(
        before, after, DOUBLE, grad_rms=1.0, momentum_rms=1.0, lr=LR, weight_decay=DECAY, decoupled_decay=DECAY,
        ns_input=momentum, ns_roundoff=DOUBLE, newton_schulz=JORDAN_5, output_scale=scale, target_rms=scale / np.sqrt(max(momentum.shape)),
    )  # fmt: skip


def test_first_adamw_step():
    measured = measure_update(adamw_step())
    moved = LR * (1 + DECAY)
    assert measured["update_rms"] == pytest.approx(moved, rel=1e-13)
    assert measured["update_norm"] == pytest.approx(moved * np.sqrt(24), rel=1e-13)
    assert measured["update_rms_per_lr"] == pytest.approx(1, rel=1e-13)
    assert measured["weight_rms"] == 1
    assert measured["update_to_weight"] == pytest.approx(moved, rel=1e-13)
    assert measured["momentum_rms"] == pytest.approx(0.1 * measured["grad_rms"])
    assert (measured["lr"], measured["weight_decay"]) == (LR, DECAY)
    assert measured["update_noise"] == pytest.approx(0.425 * DOUBLE / moved)


def test_coupled_decay_stays_in_the_update():
    step = replace(adamw_step(), decoupled_decay=0.0)
    assert measure_update(step)["update_rms_per_lr"] == pytest.approx(1 + DECAY, rel=1e-13)
    assert measure_update(step)["weight_decay"] == DECAY


def test_geometry_without_orthogonalisation_has_no_residual():
    step = adamw_step()
    measured = measure_geometry(step)
    sigma = np.linalg.svd(step.ns_input, compute_uv=False)
    assert measured["fro_norm"] == pytest.approx(np.linalg.norm(step.ns_input), rel=1e-14)
    assert measured["condition_number"] == pytest.approx(sigma[0] / sigma[-1], rel=1e-10)
    assert measured["stable_rank"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-12)
    assert unsketch(measured["sigma_quantile"], 4) == pytest.approx(sigma / np.linalg.norm(sigma), rel=1e-10)
    assert (measured["condition_is_floor"], measured["below_floor"]) == (False, 0)
    assert set(measured) == {"sigma_quantile", "fro_norm", "condition_number", "condition_is_floor", "stable_rank", "below_floor"}


def test_muon_step():
    step = muon_step()
    measured = measure_update(step)
    output = iterate(step.ns_input, (JORDAN,) * 5)
    assert measured["update_rms_per_lr"] == pytest.approx(2 * np.linalg.norm(output) / np.sqrt(32 * 64), rel=1e-12)
    assert measured["update_rms"] == pytest.approx(np.linalg.norm(step.weight_before - step.weight_after) / np.sqrt(32 * 64), rel=1e-13)


def test_muon_residuals_are_those_of_the_iteration():
    step = muon_step()
    measured = measure_geometry(step)
    u, _, vt = np.linalg.svd(step.ns_input, full_matrices=False)
    assert len(measured["ns_residual"]) == len(measured["ns_residual_polar"]) == NS_STEPS + 1
    for steps in range(NS_STEPS + 1):
        output = iterate(step.ns_input, (JORDAN,) * steps)
        assert measured["ns_residual"][steps] == pytest.approx(np.linalg.norm(np.eye(32) - output @ output.T) / np.sqrt(32), abs=1e-11)
        assert measured["ns_residual_polar"][steps] == pytest.approx(np.linalg.norm(output - u @ vt) / np.sqrt(32), abs=1e-11)
    # Read back from the weights, O is the one that went in: prediction and achievement agree to float64.
    output = iterate(step.ns_input, (JORDAN,) * 5)
    assert measured["ns_residual_achieved"] == pytest.approx(measured["ns_residual"][5], abs=1e-12)
    assert measured["alignment"] == pytest.approx((step.ns_input * output).sum() / np.linalg.norm(step.ns_input, "nuc"), rel=1e-12)


def test_an_exact_polar_update_has_no_residual_and_full_alignment():
    step = muon_step()
    u, _, vt = np.linalg.svd(step.ns_input, full_matrices=False)
    measured = measure_geometry(replace(step, weight_after=step.weight_before * (1 - LR * DECAY) - LR * 2.0 * u @ vt))
    assert measured["ns_residual_achieved"] == pytest.approx(0, abs=1e-12)
    assert measured["alignment"] == pytest.approx(1, abs=1e-12)


def test_float32_weights_shift_the_achieved_residual_by_their_noise():
    step = muon_step(weight_scale=1.0)
    stored = replace(step, weight_before=step.weight_before.astype(np.float32), weight_roundoff=SINGLE)
    stored = replace(
        stored, weight_after=(stored.weight_before * (1 - LR * DECAY) - LR * 2 * iterate(step.ns_input, (JORDAN,) * 5)).astype(np.float32)
    )
    exact, measured = measure_geometry(step), measure_geometry(stored)
    assert measure_update(stored)["update_noise"] < 1e-5
    # Measured: 1.4e-7 and 1.2e-7 at a noise of 2.3e-6.
    assert measured["ns_residual_achieved"] == pytest.approx(exact["ns_residual_achieved"], abs=1e-6)
    assert measured["alignment"] == pytest.approx(exact["alignment"], abs=1e-6)


def test_the_largest_readable_noise_shifts_the_residual_by_about_two_percent():
    step = muon_step()
    exact = measure_geometry(step)["ns_residual_achieved"]
    size = READABLE_NOISE * np.linalg.norm(step.applied)
    # Rounding points anywhere. Measured over 30 draws: up to 0.2 %. The worst direction is the update's own: 2.1 %.
    anywhere, along = gaussian(32, 64, 10), step.weight_before * (1 - LR * DECAY) - step.weight_after
    for noise, tolerance in ((anywhere, 5e-3), (along, 2.5e-2), (-along, 2.5e-2)):
        shifted = replace(step, weight_after=step.weight_after + noise * (size / np.linalg.norm(noise)))
        assert measure_geometry(shifted)["ns_residual_achieved"] == pytest.approx(exact, rel=tolerance)


def test_bfloat16_weights_leave_the_achieved_out():
    step = muon_step(weight_scale=1.0)

    def stored(array):
        return torch.from_numpy(array).bfloat16().float().numpy()

    step = replace(step, weight_before=stored(step.weight_before), weight_after=stored(step.weight_after), weight_roundoff=BFLOAT16)
    measured = measure_geometry(step)
    assert measure_update(step)["update_noise"] > 0.01
    # The prediction hangs on the NS input alone and stays.
    assert "ns_residual" in measured
    assert not {"ns_residual_achieved", "alignment"} & set(measured)


def test_no_learning_rate_leaves_nothing_to_read_back():
    step = muon_step()
    still = replace(step, weight_after=step.weight_before, lr=0.0)
    updated, measured = measure_update(still), measure_geometry(still)
    assert (updated["update_rms"], updated["update_norm"], updated["update_to_weight"], updated["lr"]) == (0, 0, 0, 0)
    assert np.isnan(updated["update_rms_per_lr"])
    assert updated["update_noise"] == np.inf
    assert measured["ns_residual"] == pytest.approx(measure_geometry(step)["ns_residual"])
    assert not {"ns_residual_achieved", "alignment"} & set(measured)


def test_zero_weights_have_no_update_ratio():
    step = replace(adamw_step(), weight_before=np.zeros((4, 6)))
    assert np.isnan(measure_update(step)["update_to_weight"])


@pytest.mark.parametrize(("fill", "norm"), [(0.0, 0.0), (np.nan, np.nan), (np.inf, np.inf), (-np.inf, np.inf)])
def test_an_input_without_a_spectrum_leaves_its_norm_only(fill, norm):
    # ‖M‖_F of the whole matrix; one bad entry is enough.
    bad = np.zeros((32, 64), dtype=np.float32)
    bad[3, 5] = fill
    assert measure_geometry(replace(muon_step(), ns_input=bad)) == pytest.approx({"fro_norm": norm}, nan_ok=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_weights_that_diverged_are_data_and_no_warning(bad):
    step = muon_step()
    step.weight_before[0, 0] = step.weight_after[0, 0] = bad
    assert not np.isfinite(measure_update(step)["weight_rms"])
    assert not {"ns_residual_achieved", "alignment"} & set(measure_geometry(step))


def test_the_floor_is_that_of_the_format_the_input_was_stored_in():
    matrix = np.diag([1.0, 1e-6]).astype(np.float32)
    for roundoff, is_floor in ((SINGLE, False), (BFLOAT16, True)):
        measured = measure_geometry(replace(adamw_step(), ns_input=matrix, ns_roundoff=roundoff))
        assert (measured["condition_is_floor"], measured["below_floor"]) == (is_floor, int(is_floor))
        assert measured["condition_number"] == pytest.approx(1 / (0.425 * BFLOAT16 * 2 / np.sqrt(2)) if is_floor else 1e6, rel=1e-4)


def test_an_input_below_eps_is_not_normalised():
    # Muon divides by max(‖M‖_F, ε): at ‖M‖_F = 1e-9 the iteration starts at x/100.
    step = muon_step()
    tiny = step.ns_input * (1e-9 / np.linalg.norm(step.ns_input))
    measured = measure_geometry(replace(step, ns_input=tiny))
    for steps in (0, 5):
        output = iterate(tiny, (JORDAN,) * steps)
        assert measured["ns_residual"][steps] == pytest.approx(np.linalg.norm(np.eye(32) - output @ output.T) / np.sqrt(32), abs=1e-11)
    assert measured["ns_residual"][5] > measure_geometry(step)["ns_residual"][5] + 0.1
    # What is stored is the normalised spectrum all the same.
    assert (measured["sigma_quantile"] ** 2).max() == pytest.approx(1 / measured["stable_rank"])


def test_zero_steps_leave_the_curve_flat():
    measured = measure_geometry(replace(muon_step(), newton_schulz=NewtonSchulz((), 1e-7)))
    assert (measured["ns_residual"] == measured["ns_residual"][0]).all()
    assert measured["ns_residual"].shape == (NS_STEPS + 1,)


def test_short_schedules_repeat_their_last_triple():
    short = measure_geometry(replace(muon_step(), newton_schulz=NewtonSchulz((JORDAN,), 1e-7)))
    assert (short["ns_residual"] == measure_geometry(muon_step())["ns_residual"]).all()


def test_tall_and_wide_are_the_same_step():
    wide = muon_step()
    tall = replace(wide, weight_before=wide.weight_before.T, weight_after=wide.weight_after.T, ns_input=wide.ns_input.T)
    for measure in (measure_update, measure_geometry):
        there = measure(tall)
        for name, value in measure(wide).items():
            assert there[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


def test_every_quantity_measured_is_in_the_catalogue():
    step = muon_step()
    # What only the recorder knows: ns_schedule and second_moment_form are indices into lists of the run, changed_outside takes two steps.
    assert set(measure_geometry(step)) <= {quantity.name for quantity in in_group("geometry")} - {"ns_schedule"}
    assert set(measure_update(step)) <= {quantity.name for quantity in in_group("update")} - {"changed_outside"}
    # No form of the second moment has all quantities.
    ones, identity = np.ones((4, 6)), np.eye(4)
    many = [
        Moments(ones, "full", 1.0, ones, 1.0, 1.0, 1e-8, 0.0, row_blocks("mlp_up", 4, 6)),
        Moments(ones, "rotated", 1.0, ones, 1.0, 1.0, 1e-8, factors=(identity, None), bases=(identity, None)),
        Moments(ones, "hessian", 1.0, clipped=ones),
    ]
    measured = set().union(*(measure_second_moment(replace(step, moments=moments)) for moments in many))
    assert measured == {quantity.name for quantity in in_group("second_moment")} - {"second_moment_form"}
    assert set(measure_second_moment_map(replace(step, moments=many[0]))) == {quantity.name for quantity in in_group("second_moment_map")}
    assert measure_second_moment(step) == measure_second_moment_map(step) == {}
