"""64 numbers for a spectrum: exact up to rank 64, and what the residuals lose beyond."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.newton_schulz.families import FAMILIES, repeat_last
from optiscope.diagnostics.newton_schulz.spectral_map import residual_curves
from optiscope.diagnostics.spectra.spectrum_sketch import POINTS, sketch, sketch_indices, sketch_levels, unsketch


def normalised(sigma):
    sigma = np.sort(np.asarray(sigma, dtype=np.float64))[::-1]
    return sigma / np.linalg.norm(sigma)


def random_spectrum(rank, seed=0):
    return normalised(10 ** np.random.default_rng(seed).uniform(-5, 0, rank))


@pytest.mark.parametrize("rank", [1, 2, 3, 31, 32, 63, 64])
def test_exact_up_to_rank_64(rank):
    x = random_spectrum(rank)
    # Through a logarithm and back: 1e-15 measured.
    assert unsketch(sketch(x), rank) == pytest.approx(x, rel=1e-14)
    assert set(sketch(x)) == set(x)


@pytest.mark.parametrize("rank", [1, 2, 64, 65, 100, 128, 1000, 4096, 50000])
def test_indices_are_64_ascending_and_hold_both_ends(rank):
    indices = sketch_indices(rank)
    assert indices.shape == (POINTS,)
    assert (indices[0], indices[-1]) == (0, rank - 1)
    assert (np.diff(indices) >= (0 if rank < POINTS else 1)).all()
    levels = sketch_levels(rank)
    assert (levels[0], levels[-1]) == (0, 1 if rank > 1 else 0)
    assert levels == pytest.approx(indices / max(rank - 1, 1))


@given(st.integers(1, 700), st.integers(0, 1000))
def test_extremes_are_kept_and_the_order_too(rank, seed):
    x = random_spectrum(rank, seed)
    stored = sketch(x)
    assert (stored[0], stored[-1]) == (x[-1], x[0])
    assert (np.diff(stored) >= 0).all()
    back = unsketch(stored, rank)
    assert back.shape == (rank,)
    assert (back[0], back[-1]) == pytest.approx((x[0], x[-1]), rel=1e-14)
    # Descending, up to the rounding of equal neighbours.
    assert (np.diff(back) <= 1e-15).all()


@given(st.integers(65, 700), st.integers(0, 1000))
def test_every_stored_value_is_read_back(rank, seed):
    x = random_spectrum(rank, seed)
    # Descending and ascending indices of the same value add up to rank − 1.
    kept = rank - 1 - sketch_indices(rank)
    assert unsketch(sketch(x), rank)[kept] == pytest.approx(x[kept], rel=1e-14)
    # Read back and stored again it is the same 64 numbers.
    assert sketch(unsketch(sketch(x), rank)) == pytest.approx(sketch(x), rel=1e-14)


@pytest.mark.parametrize("rank", [2, 64, 65, 128, 1000])
def test_a_geometric_spectrum_is_exact_at_any_rank(rank):
    # log x linear in the index is what is drawn between stored values.
    x = normalised(np.geomspace(1, 1e-4, rank))
    assert unsketch(sketch(x), rank) == pytest.approx(x, rel=1e-13)


@pytest.mark.parametrize("rank", [1, 5, 64, 200])
def test_reading_back_is_vectorised_over_leading_dimensions(rank):
    stored = np.stack([[sketch(random_spectrum(rank, 3 * i + j)) for j in range(3)] for i in range(2)])
    back = unsketch(stored, rank)
    assert back.shape == (2, 3, rank)
    for i in range(2):
        for j in range(3):
            assert (back[i, j] == unsketch(stored[i, j], rank)).all()


def test_zero_is_read_back_as_next_to_nothing_and_nan_as_nan():
    for rank in (10, 200):
        x = normalised([1.0] * (rank - 3) + [0.0] * 3)
        back = unsketch(sketch(x), rank)
        assert back[:-3] == pytest.approx(x[:-3], rel=1e-13)
        assert (back[-3:] < 1e-29).all()
        assert np.isnan(unsketch(np.full(POINTS, np.nan), rank)).all()


# What is lost beyond rank 64, in residuals after 1 … 8 steps.


def smooth(rank):
    """σ = 10^(−L·t^γ), t from 0 to 1: from a shoulder (γ = 2) to a steep head (γ = 1/2), over one to five decades."""
    t = np.linspace(0, 1, rank)
    return [normalised(10 ** (-decades * t**gamma)) for decades in (1, 2, 3, 4, 5) for gamma in (0.5, 1, 2)]


def gaussian(rank):
    rng = np.random.default_rng(rank)
    return [normalised(np.linalg.svd(rng.standard_normal((rank, aspect * rank)), compute_uv=False)) for aspect in (1, 1, 2, 3)]


def lost(spectra, rank, family):
    """|ε̃ of what is read back − ε̃ of the full spectrum|, shape (spectra, steps)."""
    coefficients = repeat_last(FAMILIES[family].coefficients, 8)
    full = np.array([residual_curves(x, coefficients)[0][1:] for x in spectra])
    read = np.array([residual_curves(unsketch(sketch(x), rank), coefficients)[0][1:] for x in spectra])
    return np.abs(read - full)


# Measured: largest loss of ε̃ over spectra and steps, largest after 5 steps, median. The largest is that of Polar Express after
# 2 to 4 steps, where ε̃ itself is 0.8 to 1.05: a steep head (L = 4, γ = 1/2) crosses a turning point of p between stored values.
SMOOTH = {
    (128, "cubic"): (9.1e-5, 9.1e-5, 6.2e-6), (128, "jordan"): (1.7e-4, 8.2e-5, 1.5e-5), (128, "polar_express"): (6.2e-4, 1.5e-4, 9.6e-6),
    (512, "cubic"): (4.7e-4, 3.2e-4, 3.9e-5), (512, "jordan"): (5.6e-4, 5.6e-4, 8.2e-5), (512, "polar_express"): (4.5e-3, 1.8e-4, 2.4e-5),
    (1024, "cubic"): (9.6e-4, 7.3e-4, 5.1e-5), (1024, "jordan"): (1.2e-3, 6.1e-4, 8.0e-5), (1024, "polar_express"): (1.0e-2, 2.6e-4, 2.8e-5),
}  # fmt: skip


@pytest.mark.parametrize(("rank", "family"), SMOOTH)
def test_smooth_spectra_lose_little(rank, family):
    found = lost(smooth(rank), rank, family)
    largest, after_five, median = SMOOTH[rank, family]
    assert found.max() < 1.2 * largest
    assert found[:, 4].max() < 1.2 * after_five
    assert np.median(found) < 1.2 * median


@pytest.mark.parametrize("rank", [128, 256])
def test_gaussian_matrices_lose_little(rank):
    # Here single values scatter between stored neighbours. Measured over 40 draws per rank, worst of families and ranks: largest 1e-2
    # (Polar Express, step 4), after five steps 3.4e-3 (Polar Express), median 4.6e-4 (Jordan).
    for family in ("cubic", "jordan", "polar_express"):
        found = lost(gaussian(rank), rank, family)
        assert found.max() < 1.5e-2, family
        assert found[:, 4].max() < 5e-3, family
        assert np.median(found) < 1e-3, family
