"""Quantiles through bins of the numbers' bits, against sorting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from optiscope.diagnostics.catalogue import LEVELS
from optiscope.diagnostics.quantities.log_bins import WIDTH, log_quantiles

TINY = {np.float32: 2.0**-130, np.float64: 2.0**-1026}  # width of a bin of denormals


def by_sorting(values, levels=LEVELS):
    """The order statistics of rank ⌊level·(n − 1)⌋, in float64."""
    ranked = np.sort(np.asarray(values, dtype=np.float64).ravel())
    return np.array([ranked[int(np.floor(level * (len(ranked) - 1)))] for level in levels])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_second_moments_over_many_decades(kind, spread):
    values = np.exp(spread * np.random.default_rng(0).standard_normal((300, 200)) - 10).astype(kind)
    found, wanted = log_quantiles(values, LEVELS), by_sorting(values)
    np.testing.assert_allclose(found, wanted, rtol=WIDTH)
    assert (found[0], found[-1]) == (values.min(), values.max())
    # Quantiles in between are no more than a bin from NumPy's, which are between two order statistics.
    np.testing.assert_allclose(found[2:-2], np.quantile(values.astype(np.float64), LEVELS[2:-2]), rtol=2 * WIDTH)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@given(data=st.data())
def test_any_numbers(kind, data):
    width = np.finfo(kind).bits
    values = data.draw(arrays(kind, st.integers(1, 40), elements=st.floats(allow_nan=False, allow_infinity=False, width=width)))
    found, wanted = log_quantiles(values, LEVELS), by_sorting(values)
    assert (np.abs(found - wanted) <= WIDTH * np.abs(wanted) + TINY[kind]).all()
    assert (found[0], found[-1]) == (wanted[0], wanted[-1])


def test_zeros_are_exact_and_kept_apart_from_denormals():
    values = np.array([0.0] * 60 + [-0.0] * 20 + [1e-45] * 10 + [1.0] * 10, dtype=np.float32)
    found = log_quantiles(values, (0.0, 0.5, 0.85, 0.95, 1.0))
    assert found[:2].tolist() == [0.0, 0.0]
    assert 0 < found[2] < 2.0**-130
    assert found[3:] == pytest.approx([1.0, 1.0], rel=WIDTH)


def test_numbers_below_zero_come_first():
    values = np.array([-8.0, -4.0, -1.0, 0.0, 2.0, 1e6], dtype=np.float32)
    np.testing.assert_allclose(log_quantiles(values, np.arange(6) / 5 + 1e-9), values, rtol=WIDTH)


def test_infinities_are_data_and_nan_is_the_answer_to_nan():
    values = np.array([1.0, 2.0, np.inf, np.inf], dtype=np.float32)
    assert log_quantiles(values, (0.0, 0.67, 0.9, 1.0)).tolist() == [1.0, np.inf, np.inf, np.inf]
    assert np.isfinite(log_quantiles(np.array([1.0, np.finfo(np.float32).max] * 2, dtype=np.float32), (0.4, 0.7))).all()
    assert np.isnan(log_quantiles(np.array([1.0, np.nan, 2.0]), LEVELS)).all()
    assert np.isnan(log_quantiles(np.zeros((0, 3)), LEVELS)).all()


@pytest.mark.parametrize("values", [np.ones((7, 5)).T, np.float16([[1, 2], [3, 4]]), np.arange(1.0, 41).reshape(5, 8)[::2, ::3]])
def test_layouts_and_formats(values):
    np.testing.assert_allclose(log_quantiles(values, LEVELS), by_sorting(values), rtol=WIDTH)
