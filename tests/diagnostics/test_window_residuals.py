"""Residuals over all and over the recoverable singular values, against loops over single values."""

import numpy as np
import pytest

from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients
from optiscope.diagnostics.newton_schulz.recorded_spectra import RecordedSpectra, window_residuals

SHAPES = [(20, 48), (32, 16), (20, 48)]
SCHEDULES = [matched_coefficients(3), matched_coefficients(5), ((3.4445, -4.7750, 2.0315),) * 5]


def spectra(values, shapes):
    """Ranks under 64 are stored whole, in ascending order, repeated to fill; None for a record without a spectrum."""
    stored = np.full((len(values), len(shapes), 64), np.nan)
    for t, record in enumerate(values):
        for j, x in enumerate(record):
            if x is not None:
                stored[t, j] = np.sort(x)[np.rint(np.linspace(0, len(x) - 1, 64)).astype(int)]
    rows, cols = np.array(shapes).T
    place = np.arange(len(shapes))
    return RecordedSpectra(
        place.astype(str), place.astype(str), place, rows, cols, np.arange(len(values)), stored, np.zeros(stored.shape[:2])
    )


@pytest.fixture(scope="module")
def values():
    """Three records of three matrices over 6 decades, the noise of bfloat16 being at 4e-4 and 7e-4; one was not recorded."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(3):
        record = []
        for m, n in SHAPES:
            s = 10 ** -rng.uniform(0, 6, min(m, n))
            record.append(s / np.linalg.norm(s))
        found.append(record)
    found[1][2] = None
    return found


def test_residuals_are_those_of_single_values_one_by_one(values):
    found = window_residuals(spectra(values, SHAPES), SCHEDULES)
    below = 0
    for s, coefficients in enumerate(SCHEDULES):
        for t, record in enumerate(values):
            for j, (x, (m, n)) in enumerate(zip(record, SHAPES, strict=True)):
                if x is None:
                    assert np.isnan([found.square[s, t, j], found.square_recoverable[s, t, j], found.recoverable[t, j]]).all()
                    continue
                # The noise of rounding an m×n matrix to 8 bits: ‖E‖₂ = 0.425·2⁻⁸(1/√m + 1/√n)‖M‖_F.
                floor, whole, above = 0.425 / 256 * (m**-0.5 + n**-0.5), [], []
                for value in x:
                    o = value
                    for a, b, c in coefficients:
                        o = a * o + b * o**3 + c * o**5
                    whole.append((1 - o * o) ** 2)
                    above += whole[-1:] if value >= floor else []
                below += len(whole) - len(above)
                # Measured: 4e-15; spectra are read back as exponentials of logarithms.
                assert found.square[s, t, j] == pytest.approx(sum(whole) / len(whole), rel=1e-12)
                assert found.square_recoverable[s, t, j] == pytest.approx(sum(above) / len(whole), rel=1e-12)
                assert found.recoverable[t, j] == pytest.approx(len(above) / len(whole), abs=1e-12)
                assert found.residual()[s, t, j] == pytest.approx((sum(whole) / len(whole)) ** 0.5, rel=1e-12)
                assert found.residual(recoverable=True)[s, t, j] == pytest.approx((sum(above) / len(above)) ** 0.5, rel=1e-12)
    assert below > 100  # or the two would not differ


def test_the_largest_singular_value_is_always_recoverable():
    """σ_1/‖M‖_F ≥ 1/√r, and the noise is at most 0.425·2⁻⁸·2/√r: a spectrum with none above it is not that of a matrix."""
    flat = np.full(16, 0.25)
    found = window_residuals(spectra([[flat], [np.zeros(16)]], [(16, 16)]), SCHEDULES[:1])
    assert found.recoverable[:, 0].tolist() == [1.0, 0.0]
    assert found.residual()[0, 1, 0] == 1
    assert np.isnan(found.residual(recoverable=True)[0, 1, 0])
    for m in (1, 7, 4096):
        assert 0.425 / 256 * 2 / m**0.5 < m**-0.5
