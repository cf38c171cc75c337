"""The coefficient families and the Polar Express recipe: published figures, theory, and a linear program as the referee."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from optiscope.diagnostics.newton_schulz.coefficients import SCHEDULE_FAMILIES, coefficients_of
from optiscope.diagnostics.newton_schulz.families import (
    FAMILIES,
    JORDAN,
    POLAR_EXPRESS_RAW,
    fold_normalisation,
    repeat_last,
    root,
    safety_scaled,
)
from optiscope.diagnostics.newton_schulz.polar_express import (
    CUSHION,
    MATCHED_LOWER_BOUND,
    matched_coefficients,
    minimax_quintic,
    polar_express,
)
from optiscope.diagnostics.newton_schulz.spectral_map import gram_residual, ns_map
from optiscope.examples.optimizers.root import OF_SHAPE
from optiscope.examples.optimizers.turbo_muon import AOL


def grid(lower):
    return np.geomspace(lower, 1, 20001)


def after(family, steps):
    return lambda x: ns_map(x, repeat_last(FAMILIES[family].coefficients, steps))


def worst(schedule, lower):
    return np.abs(1 - ns_map(grid(lower), schedule)).max()


# What is printed about each schedule: p(x) at x = 1e-1 … 1e-6; worst |1 − p| on [1e-2, 1], [1e-3, 1], [1e-4, 1]; the band for x ≥ 1e-2.
PRINTED = {
    ("cubic", 5): (".659 .0758 .0076 .0008 8e-5 1e-5", ".924 .992 .999", ".076 1"),
    ("cubic", 15): ("1 1 .417 .0438 .0044 4e-4", "0 .583 .956", "1 1"),
    ("quintic", 5): (".996 .228 .0232 .0023 2e-4 2e-5", ".772 .977 .998", ".23 1"),
    ("jordan", 5): (".712 .699 .471 .0485 .0048 5e-4", ".318 .529 .952", ".682 1.134"),
    ("jordan", 6): ("1.101 1.116 1.170 .166 .0167 .0017", ".318 .318 .834", ".682 1.134"),
    ("jordan", 8): ("1.108 1.086 .918 1.202 .197 .0198", ".318 .318 .318", ".682 1.134"),
    ("polar_express", 5): (".891 1.054 .840 .0965 .0097 .0010", ".130 .160 .903", ".870 1.124"),
    ("polar_express", 6): (".999 .999 .993 .180 .0181 .0018", ".003 .007 .820", ".997 1.001"),
    ("polar_express", 8): ("1 1 1 .570 .0629 .0063", "0 0 .430", "1 1"),
    ("you", 5): ("1.019 1.018 .475 .0493 .0049 5e-4", ".032 .525 .951", ".978 1.032"),
    ("polar_express_speedrun", 5): ("1.016 .997 .847 .0969 .0097 .0010", ".141 .153 .903", ".859 1.141"),
    ("polar_express_gram", 5): (".879 .906 .729 .0803 .0080 8e-4", ".154 .271 .920", ".846 1.124"),
    ("polar_express_nvidia", 5): (".874 1.066 .846 .0975 .0098 .0010", ".130 .154 .903", ".870 1.124"),
    ("polar_express_nvidia_old", 5): ("1.688 .472 1.418 .163 .0163 .0016", ".834 .834 .837", ".455 1.834"),
    ("cans", 5): (".916 1.113 .887 .105 .0105 .0010", ".120 .120 .895", ".884 1.120"),
    ("deepseek_v4", 10): ("1.000 1.000 1.000 1.002 .686 .0791", ".001 .001 .002", "1 1.001"),
    ("cubic5", 5): (".802 1.022 .119 .0119 .0012 1e-4", ".300 .881 .988", ".774 1.300"),
    ("aol_flash", 4): ("1.031 1.014 .147 .0147 .0015 1e-4", ".059 .853 .985", ".941 1.050"),
}  # fmt: skip


def half_a_digit(printed):
    """Half a unit of the last printed digit, and a hair for the printed tie."""
    mantissa, _, exponent = printed.partition("e")
    decimals = len(mantissa.partition(".")[2]) or (0 if exponent else 3)  # a bare 1 or 0 stands for three decimals
    return 0.5000001 * 10.0 ** (int(exponent or 0) - decimals)


@pytest.mark.parametrize(("family", "steps"), PRINTED)
def test_published_figures_are_reproduced(family, steps):
    values, errors, band = PRINTED[family, steps]
    run = after(family, steps)
    for exponent, printed in enumerate(values.split(), start=1):
        assert run(10.0**-exponent) == pytest.approx(float(printed), abs=half_a_digit(printed)), exponent
    for exponent, printed in enumerate(errors.split(), start=2):
        assert np.abs(1 - run(grid(10.0**-exponent))).max() == pytest.approx(float(printed), abs=half_a_digit(printed)), exponent
    for found, printed in zip((run(grid(1e-2)).min(), run(grid(1e-2)).max()), band.split(), strict=True):
        assert found == pytest.approx(float(printed), abs=half_a_digit(printed))


def test_classical_families_have_a_fixed_point_of_their_order():
    # p(1) = 1 with p′(1) = 0 (cubic), and p″(1) = 0 besides (quintic).
    for family, derivatives in (("cubic", 1), ("quintic", 2)):
        ((a, b, c),) = FAMILIES[family].coefficients
        p = np.polynomial.Polynomial([0, a, 0, b, 0, c])
        assert p(1) == 1
        assert [p.deriv(order)(1) for order in range(1, derivatives + 1)] == [0] * derivatives


def test_jordan_ends_on_its_four_cycle():
    cycle = [1.13427, 0.75292, 1.04691, 0.68192]
    for x in (0.9, 0.3, 0.017, 1e-3):
        # After some steps the orbit repeats every fourth and runs through the printed values.
        orbit = [float(after("jordan", steps)(x)) for steps in range(200, 208)]
        assert orbit[:4] == pytest.approx(orbit[4:], abs=1e-12)
        start = int(np.argmax(orbit[:4]))
        assert orbit[start : start + 4] == pytest.approx(cycle, abs=5e-6)
    # Multiplier −0.143: the product of slopes around the cycle.
    p = np.polynomial.Polynomial([0, JORDAN[0], 0, JORDAN[1], 0, JORDAN[2]])
    assert np.prod([p.deriv()(x) for x in orbit[:4]]) == pytest.approx(-0.143, abs=5e-4)


def test_jordan_fixed_point_repels():
    a, b, c = JORDAN
    p = np.polynomial.Polynomial([0, a, 0, b, 0, c])
    fixed = min(x.real for x in (p - np.polynomial.Polynomial([0, 1])).roots() if abs(x.imag) < 1e-12 and x.real > 1e-9)
    assert fixed == pytest.approx(0.8680, abs=5e-5)
    assert p.deriv()(fixed) == pytest.approx(-1.58, abs=5e-3)
    # Started a hair beside it, the distance grows by that factor per step.
    distance = [abs(float(ns_map(fixed + 1e-9, (JORDAN,) * steps)) - fixed) for steps in range(5)]
    assert np.array(distance[1:]) / distance[:-1] == pytest.approx(1.58, rel=5e-3)


def test_jordan_residual_hangs_on_the_parity_of_its_steps():
    # Printed for x log-uniform on [0.01, 0.316] at T = 3 … 9: four steps beat five.
    x = np.geomspace(0.01, 0.316, 20001)
    found = [float(gram_residual(after("jordan", steps)(x))) for steps in range(3, 10)]
    assert found == pytest.approx([0.430, 0.332, 0.343, 0.339, 0.373, 0.366, 0.378], abs=1e-3)


def test_jordan_residual_on_its_cycle():
    o = np.array([1.13427, 0.75292, 1.04691, 0.68192])
    assert gram_residual(o) == pytest.approx(0.376, abs=5e-4)
    assert np.mean(o**2) == pytest.approx(0.8536, abs=5e-5)


@given(st.floats(-0.99, 0.99), st.floats(0.5, 2))
def test_folding_is_a_change_of_scale(x, factor):
    folded = fold_normalisation(POLAR_EXPRESS_RAW[:3], factor)
    assert folded[1:] == POLAR_EXPRESS_RAW[1:3]
    assert ns_map(x * factor, folded) == pytest.approx(ns_map(x, POLAR_EXPRESS_RAW[:3]), rel=1e-9, abs=1e-12)


def test_safety_scales_every_polynomial_but_the_last():
    # As the paper prints it: (a/1.01, b/1.01³, c/1.01⁵).
    scaled = safety_scaled(POLAR_EXPRESS_RAW, 1.01)
    for (a, b, c), (raw_a, raw_b, raw_c) in zip(scaled[:-1], POLAR_EXPRESS_RAW, strict=False):
        assert (a, b, c) == pytest.approx((raw_a / 1.01, raw_b / 1.01**3, raw_c / 1.01**5), rel=1e-15)
    assert scaled[-1] == POLAR_EXPRESS_RAW[-1]


def test_steps_past_the_end_repeat_the_last_triple():
    raw = POLAR_EXPRESS_RAW
    assert repeat_last(raw, 3) == raw[:3]
    assert repeat_last(raw, 10) == (*raw, raw[-1], raw[-1])
    assert repeat_last(raw, 0) == ()
    # Cycling instead would feed a converged spectrum to the steep first polynomial.
    assert abs(1 - float(ns_map(0.01, repeat_last(raw, 9)))) < 1e-9
    assert abs(1 - float(ns_map(0.01, raw + raw[:1]))) > 0.5


def test_repeat_last_refuses_nothing_and_less():
    with pytest.raises(ValueError, match=r"^coefficients: expected at least one"):
        repeat_last((), 3)
    with pytest.raises(ValueError, match=r"^steps: expected 0 or more, got -1$"):
        repeat_last((JORDAN,), -1)


def test_a_list_goes_on_as_its_authors_do_or_says_that_it_does_not():
    polar_express, you = FAMILIES["polar_express"], FAMILIES["you"]
    assert polar_express.schedule(10) == (*polar_express.coefficients, polar_express.coefficients[-1], polar_express.coefficients[-1])
    assert polar_express.schedule(3) == polar_express.coefficients[:3]
    assert FAMILIES["jordan"].schedule(7) == (JORDAN,) * 7
    with pytest.raises(
        ValueError, match=r"^steps: you has 5 triples and its authors begin anew after them, which ruins the spectrum; got 6, "
    ):
        you.schedule(6)
    assert you.schedule(4) == you.coefficients[:4]
    assert you.schedule(7, "cycle") == you.coefficients + you.coefficients[:2]
    # Held, its band stays: [.978, .994] at a sixth step, as published.
    held = you.schedule(6, "repeat")
    x = grid(1e-2)
    assert (ns_map(x, held).min(), ns_map(x, held).max()) == pytest.approx((0.978, 0.994), abs=1e-3)
    for steps in (4, 6):
        with pytest.raises(ValueError, match=rf"^steps: cubic5 is a list for exactly 5 steps, got {steps}; "):
            FAMILIES["cubic5"].schedule(steps)
        assert len(FAMILIES["cubic5"].schedule(steps, "repeat")) == steps


def test_every_family_runs_the_steps_its_authors_take():
    for family in FAMILIES.values():
        assert len(family.schedule(family.steps)) == family.steps, family.name


def test_safety_and_normalisation_are_folded_in_as_the_authors_apply_them():
    # Written out: for use, X₀ = M/(1.01‖M‖_F) and every triple but the last over (1.01, 1.01³, 1.01⁵).
    x, raw = np.geomspace(1e-3, 1, 50), POLAR_EXPRESS_RAW
    o = x / 1.01
    for a, b, c in [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in raw[:-1]] + [raw[-1]]:
        o = a * o + b * o**3 + c * o**5
    assert ns_map(x, FAMILIES["polar_express"].coefficients) == pytest.approx(o, rel=1e-12)
    o = x
    for a, b, c in raw[:5]:  # 1.05 on all five
        a, b, c = a / 1.05, b / 1.05**3, c / 1.05**5
        o = a * o + b * o**3 + c * o**5
    assert ns_map(x, FAMILIES["polar_express_gram"].coefficients) == pytest.approx(o, rel=1e-12)


def test_nvidias_polar_express_is_the_published_list_with_safety_to_four_decimals():
    found = FAMILIES["polar_express_nvidia"].coefficients
    assert np.array(found) == pytest.approx(np.array(safety_scaled(POLAR_EXPRESS_RAW, 1.01)), abs=7e-5)  # 8.20516 is cut, not rounded


# As printed: steps that lift x = 1e-1 … 1e-6 to one half.
LIFTED = {
    "jordan": (2, 4, 6, 7, 9, 11), "polar_express": (1, 3, 5, 8, 12, 16), "cans": (1, 3, 5, 7, 10, 13), "cubic": (5, 10, 16, 22, 27, 33),
}  # fmt: skip


@pytest.mark.parametrize("name", LIFTED)
def test_steps_that_lift_small_values(name):
    for k, steps in enumerate(LIFTED[name], start=1):
        reached = [float(ns_map(10.0**-k, FAMILIES[name].schedule(t))) for t in range(steps + 1)]
        assert max(reached[:-1]) < 0.5 <= reached[-1]


def test_root_has_a_triple_per_shape_and_jordans_elsewhere():
    assert root(2048, 16384) is root(16384, 2048) is FAMILIES["root_2048x16384"]
    assert root(2048, 16384).coefficients == ((3.1943, -3.8221, 1.5322),)
    assert root(2048, 4096) is FAMILIES["jordan"]


def test_a_schedule_of_any_family_and_length():
    assert coefficients_of("matched", 6) == matched_coefficients(6)
    assert "aol_flash" not in SCHEDULE_FAMILIES
    assert set(SCHEDULE_FAMILIES) == {"matched", *FAMILIES} - {"aol_flash"}
    for name in set(SCHEDULE_FAMILIES) - {"matched"}:
        family = FAMILIES[name]
        assert coefficients_of(name, family.steps) == family.schedule(family.steps)
        assert coefficients_of(name, 12)[-1] == family.coefficients[-1]
        assert len(coefficients_of(name, 1)) == 1
    for arguments, message in {
        ("aol_flash", 4): r"^family: expected one of matched, jordan, .*, got 'aol_flash'$",
        ("jordan", 0): r"^steps: expected at least 1, got 0$",
        ("matched", 9): r"^steps: matched schedules exist for 3 to 8, got 9$",
    }.items():
        with pytest.raises(ValueError, match=message):
            coefficients_of(*arguments)


def test_every_family_is_named_by_its_key_and_has_a_source():
    assert {name: family.name for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}
    assert all(family.source and family.coefficients for family in FAMILIES.values())


# The recipe.


def test_the_recipe_reproduces_the_published_list():
    design = polar_express(1e-3, 8, cushion=CUSHION, safety=1)
    # Measured: 4e-9, all of it in the last row, which the authors print as its limit (15/8, −10/8, 3/8); 7e-11 without it.
    assert np.array(design) == pytest.approx(np.array(POLAR_EXPRESS_RAW), abs=1e-8)
    assert worst(design[:5], 1e-3) == pytest.approx(0.12356, abs=5e-6)


def test_without_cushion_it_is_the_plain_minimax():
    design = polar_express(1e-3, 5, cushion=0)
    assert worst(design, 1e-3) == pytest.approx(0.113448, abs=5e-7)
    # The list of CANS (arXiv 2506.10935) is this composition to four decimals.
    cans = [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ]
    assert np.array(design) == pytest.approx(np.array(cans), abs=5.1e-5)
    assert worst(cans, 1e-3) == pytest.approx(0.1198, abs=5e-5)


# Smallest possible worst error of any T quintics on [ℓ, 1], as printed.
BEST = {
    1e-2: {3: ".269", 4: ".0125"},
    1e-3: {4: ".546", 5: ".113", 6: "9e-4"},
    1e-4: {5: ".764", 6: ".353", 7: ".029"},
    1e-5: {7: ".622", 8: ".174", 9: ".0033"},
    1e-6: {9: ".439", 10: ".057"},
}  # fmt: skip


@pytest.mark.parametrize("lower", BEST)
def test_plain_minimax_meets_the_best_possible_error(lower):
    for steps, printed in BEST[lower].items():
        design = polar_express(lower, steps, cushion=0)
        assert worst(design, lower) == pytest.approx(float(printed), abs=half_a_digit(printed)), steps
        # Theory: the error is 1 − p(ℓ), and no other schedule of the length is below it.
        assert worst(design, lower) == pytest.approx(1 - float(ns_map(lower, design)), rel=1e-6)
        for family in FAMILIES.values():
            # Not at most: what escapes ends in NaN.
            assert not worst(repeat_last(family.coefficients, steps), lower) <= worst(design, lower), family.name


@pytest.mark.parametrize(("low", "high"), [(0.01, 1.0), (0.3, 1.0), (0.2, 1.7), (0.9, 1.1)])
def test_one_step_is_the_minimax_quintic_of_a_linear_program(low, high):
    # Minimise E subject to |1 − (ax + bx³ + cx⁵)| ≤ E on a grid: variables (a, b, c, E).
    x = np.linspace(low, high, 2001)
    basis = np.stack([x, x**3, x**5], axis=1)
    one = np.ones((len(x), 1))
    solved = linprog(
        [0, 0, 0, 1],
        A_ub=np.block([[basis, -one], [-basis, -one]]),
        b_ub=np.concatenate([one, -one]).ravel(),
        bounds=[(None, None)] * 3 + [(0, None)],
    )
    triple = minimax_quintic(low, high)
    # The grid misses extrema by O(spacing²). Measured: 6e-8 in the error, 6e-7 of each coefficient.
    assert np.abs(1 - basis @ triple).max() == pytest.approx(solved.fun, abs=5e-7)
    assert triple == pytest.approx(tuple(solved.x[:3]), rel=5e-6)


def test_minimax_equioscillates_at_four_points():
    a, b, c = minimax_quintic(0.05, 1.0)
    error = 1 - (lambda x: a * x + b * x**3 + c * x**5)(np.linspace(0.05, 1, 200001))
    turns = np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1
    extremes = error[[0, *turns, -1]]
    assert len(extremes) == 4
    assert extremes == pytest.approx(np.abs(error).max() * np.array([1, -1, 1, -1]), rel=1e-8)


def test_a_narrow_interval_ends_in_the_classical_quintic():
    assert minimax_quintic(1 - 1e-7, 1.0) == (15 / 8, -10 / 8, 3 / 8)
    assert minimax_quintic(2 - 1e-7, 2.0) == (15 / 16, -10 / 64, 3 / 256)
    # Where the exchange still runs it is as close to that as rounding allows: the system's condition grows as 1/width².
    assert minimax_quintic(1 - 1e-3, 1.0) == pytest.approx((15 / 8, -10 / 8, 3 / 8), abs=5e-3)


@given(st.floats(-6.5, -1), st.floats(0.5, 2))
def test_narrow_intervals_are_solved_to_rounding(exponent, high):
    low = high * (1 - 10**exponent)
    x = np.linspace(low, high, 1001)
    a, b, c = minimax_quintic(low, high)
    # Measured: 0.08 to 0.12·w³ at width w (0.4·w³ for the classical quintic centred there); the switch adds 2e-14 at most.
    assert np.abs(1 - x * (a + x * x * (b + x * x * c))).max() < 0.13 * 10 ** (3 * exponent) + 3e-14


# Coefficients printed for 3, 4 and 5 steps before division by 1.01·‖M‖_F is folded in, and the bands on [ℓ, 1] with it.
MATCHED_PRINTED = {
    3: [(7.9103, -22.0788, 15.8691), (3.6125, -2.6503, 0.5114), (2.6879, -1.9989, 0.4550)],
    4: [(8.1377, -22.7137, 16.3254), (3.9667, -2.8368, 0.5224), (3.5003, -2.5705, 0.5026), (2.5347, -1.8720, 0.4410)],
    5: [(8.2052, -22.9019, 16.4607), (4.0669, -2.8613, 0.5184), (3.9135, -2.8243, 0.5248), (3.3060, -2.4302, 0.4870), (2.3271, -1.6925, 0.4214)],
}  # fmt: skip
MATCHED_BAND = {3: (0.713, 1.281), 4: (0.777, 1.217), 5: (0.860, 1.134), 6: (0.905, 1.090), 7: (0.952, 1.043), 8: (0.973, 1.024)}


@pytest.mark.parametrize("steps", MATCHED_PRINTED)
def test_matched_coefficients_are_the_printed_ones(steps):
    a, b, c = matched_coefficients(steps)[0]
    unfolded = [(a * 1.01, b * 1.01**3, c * 1.01**5), *matched_coefficients(steps)[1:]]
    assert np.array(unfolded) == pytest.approx(np.array(MATCHED_PRINTED[steps]), abs=5.1e-5)


@pytest.mark.parametrize("steps", MATCHED_BAND)
def test_matched_bands_are_the_printed_ones(steps):
    o = ns_map(grid(MATCHED_LOWER_BOUND[steps]), matched_coefficients(steps))
    assert (o.min(), o.max()) == pytest.approx(MATCHED_BAND[steps], abs=5e-4)
    assert len(matched_coefficients(steps)) == steps


def test_a_prefix_of_a_longer_design_is_a_poor_short_one():
    # Why a design per count is kept: three of five steps of Polar Express leave [.19, 1.87], the matched three [.71, 1.28].
    o = ns_map(grid(1e-2), repeat_last(FAMILIES["polar_express"].coefficients, 3))
    assert (o.min(), o.max()) == pytest.approx((0.19, 1.87), abs=0.01)


@pytest.mark.parametrize("steps", [2, 9, 0, -1])
def test_no_design_is_kept_outside_three_to_eight(steps):
    with pytest.raises(ValueError, match=rf"^steps: matched schedules exist for 3 to 8, got {steps}$"):
        matched_coefficients(steps)


@given(st.floats(1e-5, 0.999), st.integers(1, 10), st.sampled_from([0, CUSHION, 0.1]))
def test_any_bound_gives_a_band_around_one(lower, steps, cushion):
    design = polar_express(lower, steps, cushion=cushion)
    o = ns_map(grid(lower), design)
    # ℓ is raised, and nothing ends further above 1 than ℓ below it, but for rounding at the top of each interval, which the steep
    # slopes of later steps amplify: 3e-8 at ℓ = 1e-5 (measured; 2e-5 at 1e-8, ten steps).
    assert o.min() > lower * (1 - 1e-12)
    assert o.max() <= 2 - o.min() + 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lower=0.0, steps=5), r"^lower: expected a number between 0 and 1, got 0.0$"),
        (dict(lower=1.0, steps=5), r"^lower: expected"),
        (dict(lower=float("nan"), steps=5), r"^lower: expected"),
        (dict(lower=0.1, steps=0), r"^steps: expected at least 1, got 0$"),
        (dict(lower=0.1, steps=3, cushion=1.0), r"^cushion: expected a number from 0 to below 1, got 1.0$"),
        (dict(lower=0.1, steps=3, cushion=-0.1), r"^cushion: expected"),
        (dict(lower=0.1, steps=3, safety=0.9), r"^safety: expected at least 1, got 0.9$"),
    ],
)
def test_an_argument_outside_its_range_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        polar_express(**arguments)


def test_reference_optimizers_and_the_table_hold_the_same_lists():
    """Each was typed from its source by itself."""
    for (rows, cols), triple in OF_SHAPE.items():
        assert root(rows, cols).published == (triple,)
    assert FAMILIES["aol_flash"].published == AOL
