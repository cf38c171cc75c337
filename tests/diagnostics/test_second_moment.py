"""What is measured on the moments of one matrix, against float64 arrays worked on entry by entry."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiscope.diagnostics.catalogue import LEVELS, PARTITIONS, SECOND_MOMENT_FORMS
from optiscope.diagnostics.quantities.adam_mini import row_blocks
from optiscope.diagnostics.quantities.log_bins import WIDTH
from optiscope.diagnostics.quantities.moments import (
    Moments,
    decay_spread,
    measure_second_moment,
    measure_second_moment_map,
    share_under,
    signal_to_noise,
)


def adam(rows=40, cols=30, steps=7, beta1=0.9, beta2=0.999, eps=1e-8, **settings):
    """Moments after some steps, in float32, with their weights."""
    generator = np.random.default_rng(0)
    m, v = np.zeros((rows, cols)), np.zeros((rows, cols))
    scale = np.exp(4 * generator.standard_normal((rows, cols)) - 14)
    for _ in range(steps):
        g = scale * generator.standard_normal((rows, cols))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return Moments(
        v.astype(np.float32), "full", v.mean(), m.astype(np.float32), 1 - beta2**steps, 1 - beta1**steps, eps,
        partition=row_blocks("attn_q", rows, cols, (4, 4)), **settings,
    )  # fmt: skip


def hats(seen):
    return seen.m.astype(np.float64) / seen.m_weight, np.sqrt(seen.v.astype(np.float64) / seen.v_weight)


def test_quantiles_are_of_the_corrected_moments():
    seen = adam()
    m_hat, root = hats(seen)
    measured = measure_second_moment(seen)
    np.testing.assert_allclose(measured["second_moment_quantile"], np.quantile(root**2, LEVELS, method="lower"), rtol=WIDTH + 1e-6)
    np.testing.assert_allclose(measured["snr_quantile"], np.quantile(np.abs(m_hat) / root, LEVELS, method="lower"), rtol=WIDTH + 1e-6)
    for level in (0, -1):  # extremes
        assert measured["snr_quantile"][level] == pytest.approx(np.quantile(np.abs(m_hat) / root, LEVELS[level]), rel=1e-6)


@pytest.mark.parametrize("eps", [1e-8, 1e-7, 1e-5])
def test_shares_under_eps(eps):
    seen = adam(eps=eps)
    _, root = hats(seen)
    measured = measure_second_moment(seen)
    assert measured["second_moment_eps"] == eps
    assert measured["eps_share"] == np.mean(root < eps)
    assert measured["near_eps_share"] == np.mean(root < 1000 * eps)
    assert 0 < measured["near_eps_share"] < 1


@given(exponent=st.integers(-40, 30), weight=st.sampled_from([1.0, 0.001, 0.271]))
def test_the_bound_itself_does_not_count_in_any_format(exponent, weight):
    """√(v/w) < b strictly, at numbers on and beside the bound; b²w is not a float32 in general."""
    bound = 10.0 ** (exponent / 2)
    near = np.float32(bound * bound * weight)
    v = np.array([0, np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(np.inf)), 1e38], dtype=np.float32)
    assert share_under(v, bound, weight) == np.mean(v.astype(np.float64) < bound * bound * weight)


def test_zeros_lie_under_the_smallest_eps():
    assert share_under(np.array([0, 1e-40], dtype=np.float32), 1e-30) == 0.5
    assert np.isnan(share_under(np.ones(3), np.nan))
    assert np.isnan(share_under(np.ones(3), 1e-8, np.nan))


def test_a_coordinate_that_never_had_a_gradient_has_no_signal():
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = signal_to_noise(np.array([0.0, 1.0, -2.0, 1.0]), np.array([0.0, 4.0, 1.0, 0.0]))
    assert ratio.tolist() == [0.0, 0.5, 2.0, np.inf]


def test_decay_spread_is_that_of_one_over_the_root():
    seen = adam(coupled_decay=0.1)
    _, root = hats(seen)
    rate = 1e-3 * 0.1 / (root + seen.eps)
    wanted = np.log10(np.quantile(rate, 0.95) / np.quantile(rate, 0.05))
    # Two roots, each right to half a bin: 2·log10(1 + 2⁻⁵).
    assert measure_second_moment(seen)["decay_spread"] == pytest.approx(wanted, abs=2 * np.log10(1 + WIDTH / 2) + 1e-3)
    assert wanted > 3


def test_decay_spread_is_none_for_one_rate_and_missing_without_decay():
    seen = adam()
    assert measure_second_moment(replace(seen, coupled_decay=0.0))["decay_spread"] == 0
    assert np.isnan(measure_second_moment(seen)["decay_spread"])
    assert np.isnan(measure_second_moment(replace(seen, v_weight=np.nan, coupled_decay=0.1))["decay_spread"])
    # ε large: every coordinate shrinks alike. ε missing: it counts as 0.
    flat = measure_second_moment(replace(seen, eps=1e6, coupled_decay=0.1))["decay_spread"]
    assert flat == pytest.approx(0, abs=1e-9)
    quantiles = np.full(len(LEVELS), 4.0)
    quantiles[LEVELS.index(0.95)] = 400.0
    assert decay_spread(quantiles, np.nan, 0.1) == pytest.approx(1.0)


def test_sophias_clip_and_its_negative_curvature():
    h = np.array([[1.0, 0.0, -2.0, 3.0]])
    measured = measure_second_moment(Moments(h, "hessian", 0.5, clipped=np.array([[0.5, 1e12, -1e12, -0.99]])))
    assert (measured["sophia_win_rate"], measured["sophia_nonpositive_share"]) == (0.5, 0.5)
    assert "eps_share" not in measured
    assert "snr_quantile" not in measured


def test_unknown_weights_leave_out_what_needs_them_and_nothing_else():
    known, unknown = measure_second_moment(adam()), measure_second_moment(replace(adam(), v_weight=np.nan, m_weight=np.nan, eps=np.nan))
    assert np.isnan(unknown["second_moment_quantile"]).all()
    assert np.isnan([unknown["eps_share"], unknown["near_eps_share"], unknown["second_moment_eps"], *unknown["block_cosine"]]).all()
    assert "snr_quantile" not in unknown
    for name in ("rank1_information", "rank1_log_error", "block_dispersion", "block_step_ratio", "second_moment_mean"):
        assert unknown[name] == known[name]


def test_the_partition_is_told():
    assert PARTITIONS[measure_second_moment(adam())["block_partition"]] == "head"


@pytest.mark.parametrize("form", SECOND_MOMENT_FORMS)
@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (4, 6), (4, 2)])
def test_every_form_in_every_shape_is_measured_without_a_warning(form, shape):
    """Rank 1, blocks and maps only of what there is a number for in every coordinate."""
    seen = Moments(np.ones(shape, dtype=np.float32), form, 1.0, None, 1.0, 1.0, 1e-8, partition=row_blocks("mlp_up", 4, 6))
    measured, maps = measure_second_moment(seen), measure_second_moment_map(seen)
    everywhere = form in ("full", "quantised", "frozen") and len(shape) == 2
    assert ("rank1_information" in measured) == ("block_dispersion" in measured) == everywhere
    assert bool(maps) == (len(shape) == 2 and (everywhere or form == "row_col"))
    assert measured["second_moment_quantile"] == pytest.approx(np.ones(len(LEVELS)))


def test_factors_and_bases_by_side():
    left, right = np.diag([4.0, 1.0]), np.diag([9.0, 3.0, 3.0])
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    seen = Moments(np.ones((2, 3)), "preconditioner", 1.0, factors=(left, right), bases=(turn, None), exponent=-0.25)
    measured = measure_second_moment(seen)
    assert measured["factor_condition"] == pytest.approx([4.0, 3.0])
    assert measured["factor_effective_rank"] == pytest.approx([1.25, 15 / 9])
    assert measured["factor_exponent"] == -0.25
    # QᵀLQ = [[2.5, −1.5], [−1.5, 2.5]].
    assert measured["eigenbasis_off_diagonal"] == pytest.approx([4.5 / 17, np.nan], nan_ok=True)


def test_soaps_second_moment_says_whether_the_factors_suffice():
    v = np.outer([1.0, 5.0], [2.0, 3.0, 4.0])
    assert measure_second_moment(Moments(v, "rotated", 1.0))["eigenbasis_information"] < 1e-15
    assert measure_second_moment(Moments(np.eye(2), "rotated", 1.0))["eigenbasis_information"] == pytest.approx(np.log(2))
