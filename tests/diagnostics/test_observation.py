"""Everything measured on one step, for steps made by hand in float64 whose answers are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from optiscope.diagnostics.catalogue import NS_STEPS, READABLE_NOISE, in_group
from optiscope.diagnostics.newton_schulz.families import JORDAN
from optiscope.diagnostics.quantities.adam_mini import row_blocks
from optiscope.diagnostics.quantities.moments import Moments, measure_second_moment, measure_second_moment_map
from optiscope.diagnostics.quantities.observation import Gradient, Observation, measure_correction, measure_geometry
from optiscope.diagnostics.quantities.output_dispersion import dispersion_null, row_dispersion
from optiscope.diagnostics.quantities.problem import NewtonSchulz, Problem, measure_problem
from optiscope.diagnostics.quantities.rotation import Rotation, rotation_drift
from optiscope.diagnostics.quantities.step_taken import StepTaken, measure_update
from optiscope.diagnostics.spectra.spectrum_sketch import unsketch

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
    sizes = {"grad_rms": float(np.sqrt((gradient**2).mean())), "momentum_rms": float(np.sqrt((first**2).mean()))}
    step = StepTaken(before, after, DOUBLE, **sizes, lr=LR, weight_decay=DECAY, decoupled_decay=DECAY)
    return Observation(Problem(gradient, DOUBLE), step)


def muon_step(rows=32, cols=64, weight_scale=0.02, scale=2.0):
    """One Muon step, W ← W(1 − ηλ) − η·s·O with O = NS(M), all in float64."""
    before, momentum = weight_scale * gaussian(rows, cols, 1), gaussian(rows, cols, 2)
    after = before * (1 - LR * DECAY) - LR * scale * iterate(momentum, (JORDAN,) * 5)
    step = StepTaken(
        before, after, DOUBLE, grad_rms=1.0, momentum_rms=1.0, lr=LR, weight_decay=DECAY, decoupled_decay=DECAY,
        output_scale=scale, target_rms=scale / np.sqrt(max(momentum.shape)),
    )  # fmt: skip
    return Observation(Problem(momentum, DOUBLE, newton_schulz=JORDAN_5), step)


def changed(seen, **fields):
    """The observation with other values of some fields, each of the part that has it."""
    for name, value in fields.items():
        part = next((part for part in ("problem", "step") if hasattr(getattr(seen, part), name)), None)
        seen = replace(seen, **({name: value} if part is None else {part: replace(getattr(seen, part), **{name: value})}))
    return seen


def test_first_adamw_step():
    measured = measure_update(adamw_step().step)
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
    seen = changed(adamw_step(), decoupled_decay=0.0)
    assert measure_update(seen.step)["update_rms_per_lr"] == pytest.approx(1 + DECAY, rel=1e-13)
    assert measure_update(seen.step)["weight_decay"] == DECAY


def test_geometry_without_orthogonalisation_has_no_residual():
    seen = adamw_step()
    measured = measure_geometry(seen)
    sigma = np.linalg.svd(seen.problem.matrix, compute_uv=False)
    assert measured["fro_norm"] == pytest.approx(np.linalg.norm(seen.problem.matrix), rel=1e-14)
    assert measured["condition_number"] == pytest.approx(sigma[0] / sigma[-1], rel=1e-10)
    assert measured["stable_rank"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-12)
    assert unsketch(measured["sigma_quantile"], 4) == pytest.approx(sigma / np.linalg.norm(sigma), rel=1e-10)
    assert (measured["condition_is_floor"], measured["below_floor"]) == (False, 0)
    assert set(measured) == {
        "sigma_quantile", "fro_norm", "condition_number", "condition_is_floor", "stable_rank", "below_floor", "recoverable_share",
    }  # fmt: skip


def test_muon_step():
    seen = muon_step()
    measured = measure_update(seen.step)
    output = iterate(seen.problem.matrix, (JORDAN,) * 5)
    assert measured["update_rms_per_lr"] == pytest.approx(2 * np.linalg.norm(output) / np.sqrt(32 * 64), rel=1e-12)
    assert measured["update_rms"] == pytest.approx(
        np.linalg.norm(seen.step.weight_before - seen.step.weight_after) / np.sqrt(32 * 64), rel=1e-13
    )


def test_muon_residuals_are_those_of_the_iteration():
    seen = muon_step()
    measured = measure_geometry(seen)
    u, _, vt = np.linalg.svd(seen.problem.matrix, full_matrices=False)
    assert len(measured["ns_residual"]) == len(measured["ns_residual_polar"]) == NS_STEPS + 1
    for steps in range(NS_STEPS + 1):
        output = iterate(seen.problem.matrix, (JORDAN,) * steps)
        assert measured["ns_residual"][steps] == pytest.approx(np.linalg.norm(np.eye(32) - output @ output.T) / np.sqrt(32), abs=1e-11)
        assert measured["ns_residual_polar"][steps] == pytest.approx(np.linalg.norm(output - u @ vt) / np.sqrt(32), abs=1e-11)
    # Read back from the weights, O is the one that went in: prediction and achievement agree to float64.
    output = iterate(seen.problem.matrix, (JORDAN,) * 5)
    assert measured["ns_residual_achieved"] == pytest.approx(measured["ns_residual"][5], abs=1e-12)
    assert measured["alignment"] == pytest.approx(
        (seen.problem.matrix * output).sum() / np.linalg.norm(seen.problem.matrix, "nuc"), rel=1e-12
    )


def test_an_exact_polar_update_has_no_residual_and_full_alignment():
    seen = muon_step()
    u, _, vt = np.linalg.svd(seen.problem.matrix, full_matrices=False)
    measured = measure_geometry(changed(seen, weight_after=seen.step.weight_before * (1 - LR * DECAY) - LR * 2.0 * u @ vt))
    assert measured["ns_residual_achieved"] == pytest.approx(0, abs=1e-12)
    assert measured["alignment"] == pytest.approx(1, abs=1e-12)


def test_float32_weights_shift_the_achieved_residual_by_their_noise():
    seen = muon_step(weight_scale=1.0)
    stored = changed(seen, weight_before=seen.step.weight_before.astype(np.float32), weight_roundoff=SINGLE)
    stored = changed(
        stored,
        weight_after=(stored.step.weight_before * (1 - LR * DECAY) - LR * 2 * iterate(seen.problem.matrix, (JORDAN,) * 5)).astype(
            np.float32
        ),
    )
    exact, measured = measure_geometry(seen), measure_geometry(stored)
    assert measure_update(stored.step)["update_noise"] < 1e-5
    # Measured: 1.4e-7 and 1.2e-7 at a noise of 2.3e-6.
    assert measured["ns_residual_achieved"] == pytest.approx(exact["ns_residual_achieved"], abs=1e-6)
    assert measured["alignment"] == pytest.approx(exact["alignment"], abs=1e-6)


def test_the_largest_readable_noise_shifts_the_residual_by_about_two_percent():
    seen = muon_step()
    exact = measure_geometry(seen)["ns_residual_achieved"]
    size = READABLE_NOISE * np.linalg.norm(seen.step.applied)
    # Rounding points anywhere. Measured over 30 draws: up to 0.2 %. The worst direction is the update's own: 2.1 %.
    anywhere, along = gaussian(32, 64, 10), seen.step.weight_before * (1 - LR * DECAY) - seen.step.weight_after
    for noise, tolerance in ((anywhere, 5e-3), (along, 2.5e-2), (-along, 2.5e-2)):
        shifted = changed(seen, weight_after=seen.step.weight_after + noise * (size / np.linalg.norm(noise)))
        assert measure_geometry(shifted)["ns_residual_achieved"] == pytest.approx(exact, rel=tolerance)


def test_bfloat16_weights_leave_the_achieved_out():
    seen = muon_step(weight_scale=1.0)

    def stored(array):
        return torch.from_numpy(array).bfloat16().float().numpy()

    seen = changed(
        seen, weight_before=stored(seen.step.weight_before), weight_after=stored(seen.step.weight_after), weight_roundoff=BFLOAT16
    )
    measured = measure_geometry(seen)
    assert measure_update(seen.step)["update_noise"] > 0.01
    # The prediction hangs on the NS input alone and stays.
    assert "ns_residual" in measured
    assert not {"ns_residual_achieved", "alignment"} & set(measured)


def test_no_learning_rate_leaves_nothing_to_read_back():
    seen = muon_step()
    still = changed(seen, weight_after=seen.step.weight_before, lr=0.0)
    updated, measured = measure_update(still.step), measure_geometry(still)
    assert (updated["update_rms"], updated["update_norm"], updated["update_to_weight"], updated["lr"]) == (0, 0, 0, 0)
    assert np.isnan(updated["update_rms_per_lr"])
    assert updated["update_noise"] == np.inf
    assert measured["ns_residual"] == pytest.approx(measure_geometry(seen)["ns_residual"])
    assert not {"ns_residual_achieved", "alignment"} & set(measured)


def test_zero_weights_have_no_update_ratio():
    seen = changed(adamw_step(), weight_before=np.zeros((4, 6)))
    assert np.isnan(measure_update(seen.step)["update_to_weight"])


@pytest.mark.parametrize(("fill", "norm"), [(0.0, 0.0), (np.nan, np.nan), (np.inf, np.inf), (-np.inf, np.inf)])
def test_an_input_without_a_spectrum_leaves_its_norm_only(fill, norm):
    # ‖M‖_F of the whole matrix; one bad entry is enough.
    bad = np.zeros((32, 64), dtype=np.float32)
    bad[3, 5] = fill
    assert measure_geometry(changed(muon_step(), matrix=bad)) == pytest.approx({"fro_norm": norm}, nan_ok=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_weights_that_diverged_are_data_and_no_warning(bad):
    seen = muon_step()
    seen.step.weight_before[0, 0] = seen.step.weight_after[0, 0] = bad
    assert not np.isfinite(measure_update(seen.step)["weight_rms"])
    assert not {"ns_residual_achieved", "alignment"} & set(measure_geometry(seen))


def test_the_floor_is_that_of_the_format_the_input_was_stored_in():
    matrix = np.diag([1.0, 1e-6]).astype(np.float32)
    for roundoff, is_floor in ((SINGLE, False), (BFLOAT16, True)):
        measured = measure_geometry(changed(adamw_step(), matrix=matrix, roundoff=roundoff))
        assert (measured["condition_is_floor"], measured["below_floor"]) == (is_floor, int(is_floor))
        assert measured["condition_number"] == pytest.approx(1 / (0.425 * BFLOAT16 * 2 / np.sqrt(2)) if is_floor else 1e6, rel=1e-4)


def test_an_input_below_eps_is_not_normalised():
    # Muon divides by max(‖M‖_F, ε): at ‖M‖_F = 1e-9 the iteration starts at x/100.
    seen = muon_step()
    tiny = seen.problem.matrix * (1e-9 / np.linalg.norm(seen.problem.matrix))
    measured = measure_geometry(changed(seen, matrix=tiny))
    for steps in (0, 5):
        output = iterate(tiny, (JORDAN,) * steps)
        assert measured["ns_residual"][steps] == pytest.approx(np.linalg.norm(np.eye(32) - output @ output.T) / np.sqrt(32), abs=1e-11)
    assert measured["ns_residual"][5] > measure_geometry(seen)["ns_residual"][5] + 0.1
    # What is stored is the normalised spectrum all the same.
    assert (measured["sigma_quantile"] ** 2).max() == pytest.approx(1 / measured["stable_rank"])


def test_zero_steps_leave_the_curve_flat():
    measured = measure_geometry(changed(muon_step(), newton_schulz=NewtonSchulz((), 1e-7)))
    assert (measured["ns_residual"] == measured["ns_residual"][0]).all()
    assert measured["ns_residual"].shape == (NS_STEPS + 1,)


def test_short_schedules_repeat_their_last_triple():
    short = measure_geometry(changed(muon_step(), newton_schulz=NewtonSchulz((JORDAN,), 1e-7)))
    assert (short["ns_residual"] == measure_geometry(muon_step())["ns_residual"]).all()


def test_tall_and_wide_are_the_same_step():
    wide = muon_step()
    tall = changed(wide, weight_before=wide.step.weight_before.T, weight_after=wide.step.weight_after.T, matrix=wide.problem.matrix.T)
    for measure in (lambda seen: measure_update(seen.step), measure_geometry):
        there = measure(tall)
        if measure is measure_geometry:
            there["row_dispersion"], there["column_dispersion"] = there["column_dispersion"], there["row_dispersion"]
        for name, value in measure(wide).items():
            assert there[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


def everything():
    """A Muon step whose optimizer also corrects the gradient, has a trust ratio and turns: no such optimizer, but every quantity."""
    seen, still = muon_step(), np.eye(32)
    gradient, momentum = gaussian(32, 64, 3), seen.problem.matrix
    return changed(
        seen, gradient=Gradient(gradient, DOUBLE, gradient), rotation=Rotation(still, still, momentum, momentum, momentum), trust_ratio=1.0
    )


def test_every_quantity_measured_is_in_the_catalogue():
    seen = everything()
    # What only the recorder knows: ns_schedule and second_moment_form are indices into lists of the run, changed_outside takes two steps.
    assert set(measure_geometry(seen)) == {quantity.name for quantity in in_group("geometry")} - {"ns_schedule"}
    update = measure_update(seen.step) | measure_correction(seen.gradient)
    assert set(update) == {quantity.name for quantity in in_group("update")} - {"changed_outside"}
    # No form of the second moment has all quantities.
    ones, identity = np.ones((4, 6)), np.eye(4)
    many = [
        Moments(ones, "full", 1.0, ones, 1.0, 1.0, 1e-8, 0.0, row_blocks("mlp_up", 4, 6)),
        Moments(ones, "rotated", 1.0, ones, 1.0, 1.0, 1e-8, factors=(identity, None), bases=(identity, None)),
        Moments(ones, "hessian", 1.0, clipped=ones),
    ]
    measured = set().union(*map(measure_second_moment, many))
    assert measured == {quantity.name for quantity in in_group("second_moment")} - {"second_moment_form"}
    assert set(measure_second_moment_map(many[0])) == {quantity.name for quantity in in_group("second_moment_map")}


def test_a_problem_without_a_step_has_all_but_what_was_achieved():
    """As of a checkpoint's momentum: the same numbers to the bit, and O run once more in float32."""
    seen = muon_step()
    whole, alone = measure_geometry(seen), measure_geometry(replace(seen, step=None))
    assert set(whole) - set(alone) == {"ns_residual_achieved", "alignment"}
    for name in measure_problem(seen.problem):
        np.testing.assert_array_equal(alone[name], whole[name])
    for name in ("row_dispersion", "column_dispersion"):
        assert alone[name] == pytest.approx(whole[name], rel=3e-5)  # float32 against float64: 3e-6 measured


def orthogonal(size, seed=0):
    return np.linalg.qr(gaussian(size, size, seed))[0]


def test_share_of_singular_values_above_bfloat16s_rounding():
    sigma = np.logspace(0, -5, 32)
    matrix = (orthogonal(32, 1) * sigma) @ orthogonal(64, 2)[:32]
    measured = measure_geometry(changed(muon_step(), matrix=matrix))
    # 0.425·2⁻⁸ = 0.00166, reference A.4.
    floor = 0.00166 * (1 / np.sqrt(32) + 1 / np.sqrt(64))
    assert measured["recoverable_share"] == pytest.approx((sigma / np.linalg.norm(sigma) > floor).mean())
    assert 0.4 < measured["recoverable_share"] < 0.8
    # Of the iteration's format, not of the input's own.
    assert measured["below_floor"] == 0


def exact_polar(rows, cols, seed=2):
    """A step whose update is the exact polar factor of its input."""
    seen = muon_step(rows, cols) if rows <= cols else muon_step(cols, rows)
    momentum = gaussian(rows, cols, seed)
    u, _, vt = np.linalg.svd(momentum, full_matrices=False)
    before = np.zeros((rows, cols))
    return changed(seen, weight_before=before, weight_after=-LR * 2 * u @ vt, matrix=momentum)


def test_rows_of_an_exact_polar_factor_have_one_length_on_the_short_side():
    for shape in ((32, 64), (48, 48)):
        assert measure_geometry(exact_polar(*shape))["row_dispersion"] < 1e-12
    measured = measure_geometry(exact_polar(64, 32))
    assert measured["column_dispersion"] < 1e-12
    assert measured["row_dispersion"] > 0.1


def test_leverage_of_a_tall_random_matrix_scatters_as_beta():
    """Reference G, NorMuon: 1024×256, .0765 predicted and .0775 measured. Here 8 draws: the mean lies within 3 standard errors."""
    drawn = [measure_geometry(exact_polar(256, 64, seed))["row_dispersion"] for seed in range(8)]
    assert dispersion_null(256, 64) == pytest.approx(np.sqrt(2 * 192 / (64 * 258)))
    assert abs(np.mean(drawn) - dispersion_null(256, 64)) < 3 * np.std(drawn, ddof=1) / np.sqrt(8)
    u, _, vt = np.linalg.svd(gaussian(1024, 256), full_matrices=False)
    leverage = ((u @ vt) ** 2).sum(1)
    assert row_dispersion(u @ vt) == pytest.approx(leverage.std() / leverage.mean(), rel=1e-12)
    assert row_dispersion(u @ vt) == pytest.approx(dispersion_null(1024, 256), abs=0.008)  # 0.0020 over 12 draws, their mean .0752


def test_where_more_than_a_scale_follows_the_iteration_is_run_once_more():
    seen = muon_step(64, 32)
    read_back = measure_geometry(seen)
    for unreadable in (changed(seen, output_scale=np.nan), changed(seen, weight_roundoff=1.0)):
        replayed = measure_geometry(unreadable)
        assert "ns_residual_achieved" not in replayed
        for name in ("row_dispersion", "column_dispersion"):
            # float32 against float64: 3e-6 measured.
            assert replayed[name] == pytest.approx(read_back[name], rel=3e-5)
    assert not {"row_dispersion", "column_dispersion"} & set(measure_geometry(adamw_step()))


def test_a_correction_of_nothing():
    gradient = gaussian(4, 6)
    measured = measure_correction(Gradient(gradient, corrected=gradient.copy()))
    assert measured["correction_variance_ratio"] == 1
    assert measured["correction_cosine"] == pytest.approx(1, abs=1e-15)
    assert measure_correction(Gradient(gradient)) == {}


def test_a_correction_by_hand():
    # C = G + 0.475·(G − L), L = −G/2 + N with N ⊥ G: C = 1.7125·G − 0.475·N.
    gradient, other = np.array([[1.0, 1.0, -1.0, -1.0]]), np.array([[1.0, -1.0, 1.0, -1.0]])
    corrected = gradient + 0.475 * (gradient - (-gradient / 2 + other))
    measured = measure_correction(Gradient(gradient, corrected=corrected))
    assert measured["correction_variance_ratio"] == pytest.approx(1.7125**2 + 0.475**2)
    assert measured["correction_cosine"] == pytest.approx(1.7125 / np.hypot(1.7125, 0.475))


def test_a_rotation_into_singular_vectors_gains_what_the_polar_factor_does():
    """R = U and f normalising rows: R f(RᵀM) = Q (reference G, ARO), which follows M best of all matrices with its norm on the range."""
    momentum = np.diag([5.0, 1.0, 0.2]) @ orthogonal(6)[:3] @ np.diag([1.0, 2, 3, 4, 5, 6])
    u, sigma, _ = np.linalg.svd(momentum, full_matrices=False)

    def rows(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    rotation = Rotation(np.eye(3), u, momentum, rows(momentum), u @ rows(u.T @ momentum))
    measured = measure_geometry(changed(adamw_step(), matrix=momentum, rotation=rotation))
    assert measured["rotation_gain"] == pytest.approx(sigma.sum() / (momentum * rows(momentum)).sum(), rel=1e-12)
    assert measured["rotation_drift"] == pytest.approx(1 - np.mean(np.diag(u.T) ** 2), rel=1e-12)
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    turned = replace(rotation, before=u, after=u @ turn)
    assert rotation_drift(turned) == pytest.approx(2 / 3 * np.sin(angle) ** 2, rel=1e-12)
