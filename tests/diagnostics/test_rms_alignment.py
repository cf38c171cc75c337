"""Size of an update beside its target: against orthogonalised matrices whose singular values are known."""

import numpy as np
import pytest

from optiscope.diagnostics.newton_schulz.families import FAMILIES, repeat_last
from optiscope.diagnostics.newton_schulz.recorded_spectra import NsSchedule
from optiscope.diagnostics.quantities.update_alignment import band_of, explained, is_readable, known_size, split_excess
from optiscope.diagnostics.spectra.spectrum_sketch import sketch

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


def newton_schulz(x, coefficients):
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_the_split_adds_up_to_what_the_iteration_leaves_of_a_matrix():
    """12×30 of rank 5: a² − 1 of the iteration's real output, and seven of twelve directions that nothing lifts."""
    rng = np.random.default_rng(3)
    m = rng.standard_normal((12, 5)) @ rng.standard_normal((5, 30))
    x = m / np.linalg.norm(m)
    a = np.linalg.norm(newton_schulz(x, JORDAN)) / np.sqrt(12)
    stored = sketch(np.linalg.svd(x, compute_uv=False))[None, None].astype(np.float32)
    schedules = [NsSchedule(((1.0, 0.0, 0.0),), 0.0, "aol"), NsSchedule(JORDAN, 0.0)]
    under, band = split_excess(stored, np.array([[1]]), schedules, np.array([12]))
    # float32 as the store has it; seen: 1e-8.
    assert float((under + band)[0, 0]) == pytest.approx(a**2 - 1, abs=1e-6)
    assert float(under[0, 0]) == pytest.approx(-7 / 12, abs=1e-6)
    low, high = explained(np.linalg.norm(np.eye(12) - newton_schulz(x, JORDAN) @ newton_schulz(x, JORDAN).T) / np.sqrt(12))
    assert low < a < high
    # Not of M/‖M‖_F, and not orthogonalised at all.
    assert np.isnan(split_excess(stored, np.array([[0]]), schedules, np.array([12]))).all()
    assert np.isnan(split_excess(stored, np.array([[-1]]), schedules, np.array([12]))).all()


def test_the_size_is_the_intended_one_where_that_is_known():
    np.testing.assert_array_equal(known_size([1.0, 2.0, np.nan], [np.nan, 3.0, 4.0]), [1.0, 3.0, 4.0])
    np.testing.assert_array_equal(is_readable([0.01, 0.5, 0.5, np.nan], [np.nan, np.nan, 1.0, np.nan]), [True, False, True, False])


def test_nothing_is_too_small_where_the_residual_is_that_of_a_zero():
    low, high = explained([0.0, 1.0, 3.0, np.nan])
    np.testing.assert_allclose(low, [0.98, 0, 0, np.nan])
    np.testing.assert_allclose(high, [1.02, 1.02 * 2**0.5, 2.04, np.nan])


@pytest.mark.parametrize(
    ("family", "low", "high"), [("jordan", 0.682, 1.134), ("you", 0.978, 1.032), ("polar_express", 0.870, 1.124), ("cans", 0.884, 1.120)]
)
def test_tolerances_are_the_published_bands(family, low, high):
    """Of five steps from x = 0.01 on, as tabled to three decimals; 2 % wider."""
    found = band_of(repeat_last(FAMILIES[family].coefficients, 5))
    assert found == pytest.approx((0.98 * low, 1.02 * high), abs=6e-4)


def test_a_tolerance_holds_the_size_of_a_polar_factor_and_no_negative_one():
    # One step 0.5·x ends at a half; one that turns all signs, at −1 at x = 1.
    assert band_of(((0.5, 0.0, 0.0),)) == pytest.approx((0.98 * 0.005, 1.02))
    assert band_of(((-2.0, 0.0, 0.0),)) == pytest.approx((0, 2.04))
