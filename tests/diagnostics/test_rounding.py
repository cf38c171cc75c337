"""Twelve bits of mantissa, against exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.spectra.spectrum_sketch import rounded

normal = st.floats(min_value=2.0**-126, max_value=1e38)


def nearest(value: float) -> float:
    """The multiple of 2^(e − 12) nearest to `value` in [2^e, 2^(e + 1)), ties to the even one; Python's `round` of a fraction does just that."""
    unit = Fraction(2) ** (math.frexp(value)[1] - 1 - 12)
    return float(round(Fraction(value) / unit) * unit)


@given(normal)
def test_it_is_the_nearest_number_of_twelve_bits(value: float) -> None:
    assert rounded(value) == nearest(value)
    assert rounded(-value) == -nearest(value)
    assert abs(Fraction(float(rounded(value))) - Fraction(value)) <= Fraction(value) / 2**13


@given(st.integers(0, 2**12), st.integers(-126, 126))
def test_ties_go_to_the_even_one(mantissa: int, exponent: int) -> None:
    value = (2 * (2**12 + mantissa) + 1) * 2.0 ** (exponent - 13)
    assert rounded(value) == nearest(value)


@given(st.lists(st.floats(allow_nan=False), max_size=30))
def test_order_is_kept(values: list[float]) -> None:
    assert (np.diff(rounded(sorted(values))[np.isfinite(rounded(sorted(values)))]) >= 0).all()


@given(st.floats())
def test_what_is_rounded_is_what_float32_stores_and_stays_as_it_is(value: float) -> None:
    once = rounded(value)
    np.testing.assert_array_equal(rounded(once), once)
    np.testing.assert_array_equal(once.astype(np.float32).astype(np.float64), once)


def test_the_ends_of_the_range() -> None:
    special = [0.0, np.inf, -np.inf, np.nan, 1e39, -1e300]
    np.testing.assert_array_equal(rounded(special), [0, np.inf, -np.inf, np.nan, np.inf, -np.inf])
    assert np.signbit(rounded(-0.0))
    # Denormals of float32 are multiples of 2⁻¹⁴⁹: half of that, and what the twelve bits lose of 2⁻¹²⁶, which is less than 2⁻¹³⁹.
    tiny = np.geomspace(1e-46, 2.0**-126, 1000)
    assert np.abs(rounded(tiny) - tiny).max() <= 2.0**-139
    assert rounded(2.0**-149) == 2.0**-149
    assert rounded(1e-200) == 0


def test_shapes_and_input_are_left_alone() -> None:
    given = np.full((2, 3), 1 + 2.0**-20)
    assert rounded(given).shape == (2, 3)
    assert (given == 1 + 2.0**-20).all()
    assert rounded(given[:, ::2]).tolist() == [[1, 1], [1, 1]]
