"""Published figures of Newton–Schulz iterations and of exact polar factors, to all their digits."""

import numpy as np
import pytest

from optiscope.diagnostics.newton_schulz.families import repeat_last
from optiscope.diagnostics.newton_schulz.spectral_map import ns_map
from optiscope.diagnostics.quantities.output_dispersion import dispersion_null, row_dispersion

JORDAN = (3.4445, -4.7750, 2.0315)
YOU = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
)  # fmt: skip


def test_jordan_to_five_digits():
    assert round(float(ns_map(0.1, (JORDAN,) * 5)), 5) == 0.71212
    assert round(float(ns_map(1e-3, (JORDAN,) * 5)), 5) == 0.47054
    # The largest error on [0.01, 1] is at a minimum inside: a grid of 10⁻⁶ is right to 10⁻⁹ there.
    errors = np.abs(1 - ns_map(np.linspace(0.01, 1, 990_001), (JORDAN,) * 5))
    assert round(float(errors.max()), 5) == 0.31817


def test_yous_band_to_four_digits_and_what_a_sixth_step_does_to_it():
    x = np.linspace(0.01, 1, 990_001)
    o = ns_map(x, YOU)
    assert (round(float(o.min()), 4), round(float(o.max()), 4)) == (0.9778, 1.0318)
    # Cycled, the steep first polynomial meets a converged spectrum; the last one repeated keeps it.
    assert ns_map(x, (*YOU, YOU[0])).max() < 0.2
    again = ns_map(x, repeat_last(YOU, 6))
    assert (again.min() >= 0.978, again.max() <= 1.032) == (True, True)


@pytest.mark.parametrize("shape", [(24, 24), (24, 60)])
def test_rows_of_a_wide_polar_factor_are_equally_long_and_normuon_changes_nothing(shape):
    u, _, vt = np.linalg.svd(np.random.default_rng(1).standard_normal(shape), full_matrices=False)
    o = u @ vt
    assert row_dispersion(o) < 1e-12
    # NorMuon's rule: rows over the root of their mean square, the Frobenius norm restored.
    even = o / np.sqrt((o**2).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(even * np.linalg.norm(o) / np.linalg.norm(even), o, atol=1e-12)


def test_rows_of_a_tall_polar_factor_spread_as_leverage_scores_do():
    assert round(dispersion_null(1024, 256), 4) == 0.0765
    rng = np.random.default_rng(2)
    # The column space of a Gaussian matrix by QR. One draw scatters by 1/√(2·1024) = 2.2 %, the mean of 8 by 0.8 %: three of those.
    found = [row_dispersion(np.linalg.qr(rng.standard_normal((1024, 256)))[0]) for _ in range(8)]
    assert np.mean(found) == pytest.approx(dispersion_null(1024, 256), rel=0.024)
