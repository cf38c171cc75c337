"""Gradients, blocks, pairs of layers and low precision: built answers, SciPy's subspace angles, exact SVDs."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from optiscope.diagnostics.catalogue import NS_STEPS, in_group
from optiscope.diagnostics.newton_schulz.families import JORDAN
from optiscope.diagnostics.quantities.observation import Gradient, Observation
from optiscope.diagnostics.quantities.on_request import measure_block, measure_gradient, measure_pair, measure_precision
from optiscope.diagnostics.quantities.problem import NewtonSchulz, Problem
from optiscope.diagnostics.quantities.step_taken import StepTaken
from optiscope.diagnostics.spectra.spectrum_sketch import unsketch

DOUBLE, BFLOAT16 = 2.0**-53, 2.0**-8


def gaussian(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols))


def orthogonal(size, seed=0):
    return np.linalg.qr(gaussian(size, size, seed))[0]


def problem(matrix, **fields):
    return Problem(matrix, DOUBLE, **fields)


def names(group):
    return {quantity.name for quantity in in_group(group)}


# Gradients.


def test_gradient_is_measured_beside_the_input():
    gradient, momentum = gaussian(6, 9), gaussian(6, 9, 1)
    measured = measure_gradient(Gradient(gradient, DOUBLE), problem(momentum))
    assert set(measured) == names("gradient")
    sigma = np.linalg.svd(gradient, compute_uv=False)
    assert unsketch(measured["gradient_sigma_quantile"], 6) == pytest.approx(sigma / np.linalg.norm(sigma), rel=1e-10)
    assert measured["gradient_fro_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-14)
    assert measured["gradient_condition_number"] == pytest.approx(sigma[0] / sigma[-1], rel=1e-10)
    assert measured["gradient_stable_rank"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-12)
    assert not measured["gradient_condition_is_floor"]
    flat = gradient.ravel(), momentum.ravel()
    assert measured["gradient_cosine"] == pytest.approx(np.dot(*flat) / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-170, 1e-30, 1e170])
def test_gradient_cosine_at_any_size(scale):
    momentum = gaussian(6, 9)
    measured = measure_gradient(Gradient(-scale * momentum), problem(momentum))
    assert measured["gradient_cosine"] == pytest.approx(-1, abs=1e-15)


def test_floor_is_that_of_the_gradients_format():
    gradient = np.diag([1.0, 1e-5])
    assert measure_gradient(Gradient(gradient, BFLOAT16), problem(gradient))["gradient_condition_is_floor"]
    assert not measure_gradient(Gradient(gradient, DOUBLE), problem(gradient))["gradient_condition_is_floor"]


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_gradient_without_a_spectrum(fill):
    gradient = np.full((3, 4), fill)
    measured = measure_gradient(Gradient(gradient), problem(gaussian(3, 4)))
    assert set(measured) == {"gradient_fro_norm", "gradient_cosine"}
    assert np.isnan(measured["gradient_cosine"])
    assert set(measure_gradient(Gradient(gradient), None)) == {"gradient_fro_norm"}


# Blocks.


@pytest.mark.parametrize("axis", [0, 1])
def test_block_is_measured_as_a_matrix_of_its_own(axis):
    matrix, before = gaussian(6, 6), gaussian(6, 6, 1)
    after, chosen = before - 0.5 * gaussian(6, 6, 2), np.array([0, 1, 4])
    step = StepTaken(before, after, DOUBLE, grad_rms=1.0, momentum_rms=1.0, lr=0.5, weight_decay=0.0, decoupled_decay=0.1)
    measured = measure_block(Observation(problem(matrix), step).part(axis, chosen))
    assert set(measured) == names("blocks")
    block = matrix[chosen] if axis == 0 else matrix[:, chosen]
    sigma = np.linalg.svd(block, compute_uv=False)
    assert unsketch(measured["block_sigma_quantile"], 3) == pytest.approx(sigma / np.linalg.norm(sigma), rel=1e-10)
    assert measured["block_condition_number"] == pytest.approx(sigma[0] / sigma[-1], rel=1e-10)
    assert measured["block_fro_norm"] == pytest.approx(np.linalg.norm(block), rel=1e-14)
    update = (before * (1 - 0.05) - after) / 0.5
    update = update[chosen] if axis == 0 else update[:, chosen]
    assert measured["block_update_rms_per_lr"] == pytest.approx(np.sqrt((update**2).mean()), rel=1e-12)
    alone = measure_block(Observation(problem(matrix)).part(axis, chosen))  # of a checkpoint there is no step
    assert set(alone) == names("blocks") - {"block_update_rms_per_lr"}


# Pairs.


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_equal_layers_stack_to_no_effect(shape):
    matrix = gaussian(*shape)
    measured = measure_pair(problem(matrix), problem(3 * matrix))
    assert set(measured) == names("stacking")
    assert measured["subspace_overlap"] == pytest.approx(1, abs=1e-12)
    # On the long side by a difference that cancels: 1e-8.
    assert measured["gram_distance"] == pytest.approx(0, abs=3e-8)
    # [M 3M] = M[1 3]: every singular value grows by √10. Stacked the other way a rectangular M gets directions that nothing fills.
    sides = [side for side in (0, 1) if shape[side] <= shape[1 - side]]
    assert measured["stack_condition_number"][sides] == pytest.approx(np.linalg.cond(matrix), rel=1e-9)
    assert measured["stack_condition_gain"][sides] == pytest.approx(0, abs=1e-9)
    assert (np.delete(measured["stack_condition_gain"], sides) < -10).all()


def test_orthogonal_subspaces_and_complementary_conditioning():
    u, v = orthogonal(4, 1), orthogonal(6, 2)
    strong, weak = np.array([10.0, 10, 1, 1]), np.array([1.0, 1, 10, 10])
    first, second = (u * strong) @ v[:4], (u * weak) @ v[[2, 3, 0, 1]]
    measured = measure_pair(problem(first), problem(second))
    # Stable rank 2.02, so q = 3: two of the three leading directions of each are orthogonal, and the third lies anywhere in what the other leads in.
    assert measured["subspace_overlap_null"] == pytest.approx([3 / 4, 3 / 6])
    only = measure_pair(problem((u * [10.0, 10, 0.1, 0.1]) @ v[:4]), problem((u * [0.01, 0.01, 10, 10]) @ v[[2, 3, 4, 5]]))
    assert only["subspace_overlap_null"] == pytest.approx([3 / 4, 3 / 6])
    exact = measure_pair(problem(np.diag([1.0, 0, 0, 0])), problem(np.diag([0, 1.0, 0, 0])))
    assert exact["subspace_overlap"] == pytest.approx(0, abs=1e-15)
    assert exact["subspace_overlap_null"] == pytest.approx(1 / 4)
    assert exact["gram_distance"] == pytest.approx(np.sqrt(2) / 2)
    # Side by side all left directions are as strong: MMᵀ + NNᵀ = 101·I. So are the right ones here, but for those that nobody uses.
    assert measured["stack_condition_number"][0] == pytest.approx(1)
    assert measured["stack_condition_gain"][0] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_pair_against_svds_and_scipys_angles(shape):
    first, second = (gaussian(*shape, seed) * np.linspace(1, 3, shape[1]) for seed in (1, 2))
    measured = measure_pair(problem(first), problem(second))
    stable = max((m**2).sum() / np.linalg.norm(m, 2) ** 2 for m in (first, second))
    q = int(np.ceil(stable))
    for side, matrices in enumerate(((first, second), (first.T, second.T))):
        leading = [np.linalg.svd(m)[0][:, :q] for m in matrices]
        assert measured["subspace_overlap"][side] == pytest.approx((np.cos(subspace_angles(*leading)) ** 2).mean(), rel=1e-9)
        grams = [m @ m.T / (m**2).sum() for m in matrices]
        assert measured["gram_distance"][side] == pytest.approx(np.linalg.norm(grams[0] - grams[1]) / 2, rel=1e-9)
        stack = np.hstack(matrices)
        assert measured["stack_condition_number"][side] == pytest.approx(np.linalg.cond(stack), rel=1e-8)
        gain = np.log10(max(map(np.linalg.cond, matrices)) / np.linalg.cond(stack))
        assert measured["stack_condition_gain"][side] == pytest.approx(gain, abs=1e-8)
        assert measured["subspace_overlap_null"][side] == pytest.approx(q / shape[side])


def test_random_subspaces_overlap_as_the_null_says():
    """40 pairs: the mean excess over the null lies within 3 of its standard errors."""
    drawn = [measure_pair(problem(gaussian(24, 48, 2 * i)), problem(gaussian(24, 48, 2 * i + 1))) for i in range(40)]
    excess = np.array([one["subspace_overlap"] - one["subspace_overlap_null"] for one in drawn])
    assert (np.abs(excess.mean(0)) < 3 * excess.std(0, ddof=1) / np.sqrt(40)).all()


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_pair_of_any_size(scale):
    first, second = gaussian(8, 12), gaussian(8, 12, 1)
    plain, scaled = measure_pair(problem(first), problem(second)), measure_pair(problem(scale * first), problem(scale * second))
    for name, value in plain.items():
        assert scaled[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_pair_without_a_spectrum(fill):
    assert measure_pair(problem(gaussian(3, 4)), problem(np.full((3, 4), fill))) == {}


# Low precision; its arithmetic is tested in test_matrix_iteration.py.


def test_precision_follows_the_optimizers_own_schedule():
    given = problem(gaussian(16, 24), newton_schulz=NewtonSchulz((JORDAN,) * 5, 1e-7))
    measured = measure_precision(given)
    assert set(measured) == names("precision")
    assert all(values.shape == (NS_STEPS + 1,) for values in measured.values())
    x = given.matrix / np.linalg.norm(given.matrix)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    for steps in range(4):
        # A well-conditioned input: bfloat16 is within 5e-3 of float64 for the first steps.
        assert measured["ns_residual_polar_bfloat16"][steps] == pytest.approx(np.linalg.norm(x - u @ vt) / 4, abs=1e-2)
        assert measured["ns_residual_bfloat16"][steps] == pytest.approx(np.linalg.norm(np.eye(16) - x @ x.T) / 4, abs=1e-2)
        a, b, c = JORDAN
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    assert measure_precision(problem(gaussian(16, 24))) == {}
    assert measure_precision(replace(given, matrix=np.zeros((16, 24)))) == {}
