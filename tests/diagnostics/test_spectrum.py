"""Condition number and its relatives, against a float64 SVD of the same stored numbers, on matrices with a built spectrum."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.spectra.spectrum import precision_floor, spectrum

BFLOAT16 = 2.0**-8


def built(rows, cols, sigma, seed=0):
    """A float32 matrix with singular values `sigma` (up to the rounding to float32) and random singular vectors."""
    rng = np.random.default_rng(seed)
    r = min(rows, cols)
    u = np.linalg.qr(rng.standard_normal((rows, r)))[0]
    v = np.linalg.qr(rng.standard_normal((cols, r)))[0]
    return ((u * sigma) @ v.T).astype(np.float32)


def log_uniform(r, kappa):
    return np.geomspace(1, 1 / kappa, r)


def clustered(r, kappa):
    """Three plateaus: half the values at 1, the last eighth at 1/κ. The hard case of a Gram matrix: its error scales with Σσ⁴."""
    sigma = np.full(r, max(0.1, 1 / kappa))
    sigma[: r // 2], sigma[-(r // 8) :] = 1, 1 / kappa
    return sigma


def svd(matrix):
    return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)


def kappa_of(matrix):
    sigma = svd(matrix)
    return sigma[0] / sigma[-1]


def to_bfloat16(matrix):
    return torch.from_numpy(matrix).bfloat16().float().numpy()


SMALL = ((64, 64), (128, 352), (352, 128))


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("shaped", [log_uniform, clustered])
def test_condition_number_is_that_of_the_svd(shape, shaped):
    # Measured worst over 3 seeds: 3e-6 at κ = 1e5 and 1e-5 at 1.9e5 (Gram route, error ∝ κ²), 4e-10 above 2e5 (SVD route).
    for kappa, tolerance in (
        (3, 1e-10),
        (1e3, 1e-8),
        (1e5, 2e-5),
        (1.9e5, 1e-4),
        (2.1e5, 1e-4),
        (9e5, 1e-4),
        (1e6, 1e-4),
        (3e6, 1e-2),
        (1e7, 1e-2),
    ):
        matrix = built(*shape, shaped(min(shape), kappa))
        found = spectrum(matrix)
        assert found.condition_number == pytest.approx(kappa_of(matrix), rel=tolerance), kappa
        assert not found.condition_is_floor


@pytest.mark.parametrize("shape", SMALL)
def test_one_small_value_below_many_large_is_the_worst_case_and_holds(shape):
    sigma = np.ones(min(shape))
    for kappa in (1.9e5, 9e5):
        sigma[-1] = 1 / kappa
        for seed in range(3):
            matrix = built(*shape, sigma, seed)
            # A Gram matrix even in float64 misses by up to 3e-5 at 1.9e5 and 7e-4 at 9e5, hence the switch between them.
            assert spectrum(matrix).condition_number == pytest.approx(kappa_of(matrix), rel=1e-4)


@pytest.mark.parametrize(("shape", "kappa", "tolerance"), [((768, 768), 1e7, 1e-2), ((1024, 3072), 1.5e5, 1e-4)])
def test_condition_number_holds_at_the_size_of_real_layers(shape, kappa, tolerance):
    # Measured: 2e-16 (SVD route) and 4e-7 (Gram route).
    matrix = built(*shape, log_uniform(min(shape), kappa))
    assert spectrum(matrix).condition_number == pytest.approx(kappa_of(matrix), rel=tolerance)


@pytest.mark.parametrize("shape", SMALL)
def test_float32_gram_fails_where_this_does_not(shape):
    matrix = built(*shape, clustered(min(shape), 1e5))
    gram = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
    assert gram.dtype == np.float32
    # The trap: σ_min² = 1e-10 lies under float32's rounding of σ_1² = 1, and comes out negative or far too large.
    smallest, largest = np.linalg.eigvalsh(gram)[[0, -1]]
    assert smallest <= 0 or abs(np.sqrt(largest / smallest) / kappa_of(matrix) - 1) > 0.5
    assert spectrum(matrix).condition_number == pytest.approx(kappa_of(matrix), rel=1e-4)


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("kappa", [1e9, 1e12])
def test_beyond_float32_a_floor_is_flagged(shape, kappa):
    matrix = built(*shape, log_uniform(min(shape), kappa))
    found = spectrum(matrix)
    assert found.condition_is_floor
    assert found.below_floor >= 1
    # A true lower bound, and not an empty one: x_1 over the rounding noise of float32.
    assert found.condition_number < min(kappa, kappa_of(matrix))
    assert found.condition_number == pytest.approx(found.normalised[0] / precision_floor(*shape, 2.0**-24))
    assert found.condition_number > 1e7


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("kappa", [1e4, 1e5])
def test_beyond_bfloat16_a_floor_is_flagged(shape, kappa):
    before = built(*shape, log_uniform(min(shape), kappa))
    matrix = to_bfloat16(before)
    # The trap: as a float32 matrix it has a condition number, to all digits, and it is that of the rounding noise.
    assert not spectrum(matrix).condition_is_floor
    assert abs(spectrum(matrix).condition_number / kappa - 1) > 0.3
    found = spectrum(matrix, unit_roundoff=BFLOAT16)
    assert found.condition_is_floor
    assert 1e3 < found.condition_number < min(kappa, kappa_of(matrix))
    assert found.below_floor == (svd(matrix) / np.linalg.norm(matrix) < precision_floor(*shape, BFLOAT16)).sum()


@pytest.mark.parametrize("shape", SMALL)
def test_within_bfloat16_the_condition_number_is_kept(shape):
    for kappa in (10, 100, 300):
        matrix = to_bfloat16(built(*shape, log_uniform(min(shape), kappa)))
        found = spectrum(matrix, unit_roundoff=BFLOAT16)
        assert not found.condition_is_floor
        assert found.condition_number == pytest.approx(kappa_of(matrix), rel=1e-8)
        # Rounding itself moved κ by up to 1.4 % (measured, 4 seeds).
        assert found.condition_number == pytest.approx(kappa, rel=0.03)


def test_a_flagged_number_bounds_the_unrounded_matrix_within_a_factor_of_two():
    # σ_r before rounding is at most σ_r + ‖E‖₂ (Weyl), and ‖E‖₂ is the floor to 5 %. Measured worst: 1.07.
    for kappa in (900, 1000, 1200, 1500, 2000, 3000):
        for seed in range(4):
            found = spectrum(to_bfloat16(built(64, 64, log_uniform(64, kappa), seed)), unit_roundoff=BFLOAT16)
            assert not found.condition_is_floor or found.condition_number < 2.1 * kappa


@pytest.mark.parametrize(("name", "unit_roundoff"), [("bfloat16", BFLOAT16), ("float16", 2.0**-11), ("float32", 2.0**-24)])
@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (128, 352), (512, 64), (64, 2048)])
def test_the_floor_is_the_size_of_rounding_noise(name, unit_roundoff, shape):
    matrix = np.random.default_rng(1).standard_normal(shape)
    rounded = torch.from_numpy(matrix).to(getattr(torch, name)).double().numpy()
    noise = np.linalg.norm(rounded - matrix, 2) / np.linalg.norm(matrix)
    # Measured over 5 seeds and these shapes: 0.948 to 1.046 of the predicted floor.
    assert noise == pytest.approx(precision_floor(*shape, unit_roundoff), rel=0.07)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e25, 1e30])
def test_scale_changes_nothing_but_the_norm(scale):
    matrix = built(24, 40, log_uniform(24, 1e4))
    scaled = matrix * np.float32(scale)
    # The trap: squared in float32 these are 0 or infinite.
    with np.errstate(over="ignore", under="ignore"):
        gram = scaled @ scaled.T
    assert not np.isfinite(gram).all() or not gram.any()
    one, other = spectrum(matrix), spectrum(scaled)
    # Scaling by anything but a power of two rounds float32 entries once more: κ moved by up to 1.5e-5 here (measured).
    assert other.condition_number == pytest.approx(one.condition_number, rel=1e-4)
    assert other.stable_rank == pytest.approx(one.stable_rank, rel=1e-6)
    assert other.fro_norm == pytest.approx(scale * one.fro_norm, rel=1e-6)
    assert other.sigma[0] == pytest.approx(scale * one.sigma[0], rel=1e-6)


@pytest.mark.parametrize("exponent", [-1060, -600, -149, 100, 600, 1020])
def test_a_power_of_two_changes_nothing_at_all(exponent):
    matrix = np.diag([8.0, 4.0, 2.0])
    found = spectrum(np.ldexp(matrix, exponent))
    assert (found.condition_number, found.below_floor) == (4.0, 0)
    assert found.normalised == pytest.approx(spectrum(matrix).normalised, rel=1e-3)  # numbers as small as 2⁻¹⁰⁶⁰ have 14 bits left


def test_a_diagonal_by_hand():
    found = spectrum(np.diag([3.0, 0.0, 4.0])[:, [0, 2]])
    assert found.sigma == pytest.approx([4, 3])
    assert found.fro_norm == pytest.approx(5)
    assert found.normalised == pytest.approx([0.8, 0.6])
    assert found.condition_number == pytest.approx(4 / 3)
    assert found.stable_rank == pytest.approx(25 / 16)
    assert found.nuclear_norm == pytest.approx(7)


def test_a_single_row_or_column_has_condition_number_one():
    for matrix in (np.array([[3.0, -4.0]]), np.array([[3.0], [-4.0]]), np.array([[-2.0]], dtype=np.float32)):
        found = spectrum(matrix)
        assert found.condition_number == pytest.approx(1, abs=1e-15)
        assert found.stable_rank == pytest.approx(1, abs=1e-15)
        assert not found.condition_is_floor


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_rank_deficient_matrix_is_a_floor_not_infinity(dtype):
    matrix = np.outer(np.arange(1, 9), np.ones(12)).astype(dtype)
    found = spectrum(matrix)
    assert found.condition_is_floor
    assert np.isfinite(found.condition_number)
    assert found.below_floor == 7
    assert found.stable_rank == pytest.approx(1, abs=1e-12)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_rotations_and_transposition_change_nothing(rows, cols, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, cols))
    u, v = np.linalg.qr(rng.standard_normal((rows, rows)))[0], np.linalg.qr(rng.standard_normal((cols, cols)))[0]
    here = spectrum(matrix)
    for there in (spectrum(u @ matrix @ v), spectrum(np.ascontiguousarray(matrix.T))):
        # Absolute error of a singular value ≲ κ·1e-15·σ_1 by the Gram route.
        assert there.sigma == pytest.approx(here.sigma, abs=1e-9 * here.sigma[0])
    assert (here.normalised**2).sum() == pytest.approx(1)
    assert 1 - 1e-12 <= here.stable_rank <= min(rows, cols) + 1e-9
    assert (np.diff(here.sigma) <= 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(bad):
    matrix = np.ones((3, 4), dtype=np.float32)
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match=r"^matrix: expected finite numbers, got NaN or infinity"):
        spectrum(matrix)


def test_zero_is_refused():
    with pytest.raises(ValueError, match=r"^matrix: expected a nonzero matrix, got all zeros"):
        spectrum(np.zeros((3, 4)))


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0), (2, 3, 4), ()])
def test_not_a_matrix_is_refused(shape):
    with pytest.raises(ValueError, match=r"^matrix: expected two non-empty dimensions, got shape .*reshape it"):
        spectrum(np.ones(shape))


@pytest.mark.parametrize("dtype", [np.int64, np.complex128, np.bool_])
def test_whole_and_complex_numbers_are_refused(dtype):
    with pytest.raises(TypeError, match=r"^matrix: expected real floating-point numbers, got"):
        spectrum(np.ones((2, 3), dtype=dtype))


def test_the_input_is_left_alone():
    matrix = built(16, 24, log_uniform(16, 10))
    copy = matrix.copy()
    spectrum(matrix)
    assert (matrix == copy).all()
