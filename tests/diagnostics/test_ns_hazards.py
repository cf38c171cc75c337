"""Hazards of known schedules, against dense grids and the published numbers; and none of them in schedules that are sound."""

import numpy as np
import pytest

from optiscope.diagnostics.newton_schulz.families import FAMILIES, JORDAN, repeat_last
from optiscope.diagnostics.newton_schulz.hazards import (
    attracting_cycle,
    escape,
    escape_radius,
    image,
    negative_intervals,
    output_band,
    restart,
)
from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients
from optiscope.diagnostics.newton_schulz.spectral_map import gram_residual

YOU = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
)  # fmt: skip
NVIDIA = (
    (8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985), (1.8726, -1.2307, 0.3585), (1.8564, -1.2132, 0.3568), (1.875, -1.25, 0.375),
)  # fmt: skip
NVIDIA_BEFORE = (
    (7.2086, -15.5131, 9.0178), (3.9623, -2.5813, 0.4542), (3.9466, -2.5765, 0.4544), (3.8991, -2.5671, 0.4566), (3.7186, -2.5308, 0.4653),
)  # fmt: skip
SPEEDRUN = (
    (8.156554524902461 / 1.02, -22.48329292557795 / 1.02**3, 15.878769915207462 / 1.02**5),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316), (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106), (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)  # fmt: skip
CANS = (
    (8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630), (3.2866, -2.4647, 0.5074), (2.2737, -1.6447, 0.4162),
)  # fmt: skip
CUBIC5 = tuple(
    (a, b, 0.0)
    for a, b in (
        (3.3656576, -3.3420992), (2.5744352, -1.4957376), (2.5368962, -1.4312570), (2.4418906, -1.2764040), (2.2230472, -0.9630650),
    )
)  # fmt: skip
AOL_FLASH = ((4.6051, -9.6552, 5.6769), (4.7505, -6.0861, 2.1790), (2.7763, -2.3190, 0.5523), (2.4231, -2.2861, 0.8193))
AOL_NVIDIA = ((4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169))
ROOT_2048 = (3.4916, -4.8224, 2.1095)

SOUND = {
    "jordan": ((JORDAN,) * 5, (0.682, 1.134)),
    "you": (YOU, (0.978, 1.032)),
    "polar express": (repeat_last(FAMILIES["polar_express"].coefficients, 5), (0.870, 1.124)),
    "polar express at 8": (repeat_last(FAMILIES["polar_express"].coefficients, 8), (1.0, 1.0)),
    "speedrun": (SPEEDRUN, (0.859, 1.141)),
    "nvidia": (NVIDIA[:5], (0.870, 1.124)),
    "cans": (CANS, (0.884, 1.120)),
    "deepseek-v4": ((JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, (1.0, 1.001)),
    "cubic5": (CUBIC5, (0.774, 1.300)),
    "aol flash": (AOL_FLASH, (0.941, 1.050)),
    "matched 3": (matched_coefficients(3), (0.713, 1.281)),
    "matched 4": (matched_coefficients(4), (0.777, 1.217)),
    "matched 5": (matched_coefficients(5), (0.870, 1.134)),
    "matched 6": (matched_coefficients(6), (0.913, 1.090)),
}


@pytest.fixture(scope="module")
def grid():
    return np.linspace(0, 1, 1_000_001)[1:]


def on_grid(x, coefficients):
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("name", SOUND)
def test_sound_schedules_have_no_hazard(name, grid):
    coefficients, band = SOUND[name]
    found = output_band(coefficients)
    # Against the extremes over a grid of 10⁻⁶: at a maximum of curvature under 10⁶ its error is under 10⁻⁶·0.5.
    values = on_grid(grid[grid >= 0.01], coefficients)
    assert found == pytest.approx((values.min(), values.max()), abs=2e-6)
    if "matched" not in name:  # those are given on [ℓ, 1], most with ℓ < 0.01
        assert found == pytest.approx(band, abs=1e-3)
    assert escape(coefficients) is None
    assert negative_intervals(coefficients) == []
    assert restart(coefficients) is None


def test_the_wrong_polar_express_list():
    assert output_band(NVIDIA_BEFORE) == pytest.approx((0.455, 1.834), abs=1e-3)
    assert escape(NVIDIA_BEFORE) is None


def test_prefixes_of_a_list_are_no_short_schedules():
    published = FAMILIES["polar_express"].coefficients
    assert output_band(published[:3]) == pytest.approx((0.19, 1.87), abs=0.01)
    assert output_band(published[:4]) == pytest.approx((0.44, 1.56), abs=0.01)


def test_a_list_that_begins_anew(grid):
    cycled = (*YOU, YOU[0])
    assert restart(cycled) == 5
    low, high = output_band(cycled)
    assert 0.06 <= low < high <= 0.17
    assert restart((*CANS, CANS[0])) == 5
    # Its sixth step is far outside of what it may be given.
    step, reached, bound = escape((*CANS, CANS[0]))
    assert step == 5
    assert bound < 1 < reached
    assert output_band((*CANS, CANS[0]))[1] == pytest.approx(7.0, abs=0.1)
    assert restart(((1.5, -0.5, 0.0),) * 15) is None
    assert restart(()) is None


def test_the_escape_of_root(grid):
    step, reached, bound = escape((ROOT_2048,) * 5)
    assert (step, round(reached, 5), round(bound, 5)) == (1, 1.22459, 1.22355)
    assert output_band((ROOT_2048,) * 5)[1] == pytest.approx(3.3, abs=0.05)
    assert output_band((ROOT_2048,) * 8) == (-np.inf, np.inf)
    # Share of (0, 1] beyond 1.3 after five steps, as published: 3.7 %.
    assert np.mean(on_grid(grid, (ROOT_2048,) * 5) > 1.3) == pytest.approx(0.037, abs=0.001)
    # Spectra that stay far from the maximum do not reach it in the first step, but in a later one.
    assert escape((ROOT_2048,) * 5, reach=0.1).step == 3


@pytest.mark.parametrize("coefficients", [AOL_NVIDIA, ((4.0098, -7.0585, 2.4635),) * 3, ((3.0, -4.0, 0.5), (2.0, -1.9, 0.1))], ids=str)
def test_signs_against_a_grid(coefficients, grid):
    intervals = negative_intervals(coefficients)
    negative = np.zeros(len(grid), bool)
    for low, high in intervals:
        negative |= (grid > low) & (grid <= high)
    assert intervals
    assert np.array_equal(negative, on_grid(grid, coefficients) < 0)


def test_the_sign_of_aol():
    ((low, high),) = negative_intervals(AOL_NVIDIA)
    assert (round(low, 4), high) == (0.8837, 1.0)
    assert negative_intervals(AOL_NVIDIA, reach=0.88) == []


def test_a_list_that_folds_over_and_over_is_told_by_its_first_steps():
    # 16, 60, 225 and 840 intervals after 3, 4, 5 and 6 steps, and 3.7 times as many with each one more.
    wild = ((5.0, -17.7, 14.0),) * 20
    assert len(negative_intervals(wild)) == 225
    assert negative_intervals(wild) == negative_intervals(wild[:5])


@pytest.mark.parametrize("triple", [(5e-324, 5e-324, 5e-324), (5e-324, 1e99, 0.0), (1.0, 1.0, 5e-324), (0.5, -0.25, 1e-310)])
def test_a_coefficient_next_to_nothing_is_nothing(triple):
    a, b, c = (value if value > 1e-300 or value < 0 else 0.0 for value in triple)
    assert escape_radius(triple) == pytest.approx(escape_radius((a, b, c)), abs=1e-40)
    assert negative_intervals((triple,) * 2) == negative_intervals(((a, b, c),) * 2)


def test_fixed_points_and_cycles():
    assert escape_radius((1.5, -0.5, 0.0)) == pytest.approx(np.sqrt(5))  # p(x) = −x
    assert escape_radius((15 / 8, -10 / 8, 3 / 8)) == pytest.approx(np.sqrt(7 / 3))
    assert escape_radius((1.0, 0.0, 0.0)) == np.inf
    cycle = attracting_cycle(JORDAN)
    assert cycle == pytest.approx((0.68192, 1.13427, 0.75292, 1.04691), abs=1e-5)
    assert gram_residual(cycle) == pytest.approx(0.376, abs=5e-4)
    assert attracting_cycle((15 / 8, -10 / 8, 3 / 8)) == pytest.approx((1.0,))
    assert attracting_cycle((1.0, 0.0, 0.0)) == ()


def test_an_image_is_exact_on_any_interval():
    rng = np.random.default_rng(0)
    for _ in range(50):
        triple = tuple(rng.normal(size=3) * (3, 4, 2))
        low, high = np.sort(rng.normal(size=2))
        a, b, c = triple
        x = np.linspace(low, high, 20_001)
        values = a * x + b * x**3 + c * x**5
        found = image(triple, (low, high))
        assert found[0] <= values.min() + 1e-12
        assert found[1] >= values.max() - 1e-12
        # Between grid points a maximum rises by at most h²/8·|p″|; seen: 3e-7.
        assert found == pytest.approx((values.min(), values.max()), abs=1e-5)
