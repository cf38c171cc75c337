"""Errors of Hessian probes: against the variances that a known Hessian gives in closed form, and against simulated probes."""

import numpy as np
import pytest

from optiscope.diagnostics.quantities.probe_error import (
    FEW_PROBES,
    bartlett_variance_bound,
    debiased_rms,
    hutchinson_variance_bound,
    probe_error,
)


def symmetric(size, seed=0):
    a = np.random.default_rng(seed).standard_normal((size, size))
    return a + a.T


def probes(shape, distribution, rng):
    return rng.standard_normal(shape) if distribution == "gaussian" else rng.choice([-1.0, 1.0], shape)


def true_variance(h, own, distribution):
    """Of the mean of u⊙Hu over the coordinates `own`, in closed form."""
    inside, outside = h[np.ix_(own, own)], np.delete(h[own], own, axis=1)
    twice = 2 * (np.sum(inside**2) - (0 if distribution == "gaussian" else np.sum(np.diag(inside) ** 2)))
    return (twice + np.sum(outside**2)) / len(own) ** 2


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_the_closed_form_and_the_bound_hold_on_simulated_probes(distribution):
    h, own, n = symmetric(12), np.arange(5), 40_000
    u = probes((n, 12), distribution, np.random.default_rng(1))
    hu = u @ h
    means = (u * hu)[:, own].mean(axis=1)
    variance = true_variance(h, own, distribution)
    # The variance of a sample variance is at most about (kurtosis − 1)/n of its square; kurtosis stays under 10 here.
    assert np.var(means) == pytest.approx(variance, rel=4 * np.sqrt(9 / n))
    bounds = [hutchinson_variance_bound(m, s, 5, distribution) for m, s in zip(means, np.mean(hu[:, own] ** 2, axis=1), strict=True)]
    assert variance <= np.mean(bounds)
    # Not only an upper bound: never more than the diagonal's part (Rademacher) and the coupling to others, twice.
    inside, outside = h[:5, :5], h[:5, 5:]
    spread = 2 * (np.sum(inside**2) + np.sum(outside**2)) / 25
    if distribution == "rademacher":
        spread -= 2 * (np.mean(np.diag(inside)) ** 2 + variance) / 5
    assert np.mean(bounds) == pytest.approx(spread, rel=0.02)


def test_one_rademacher_probe_knows_that_it_is_exact_on_a_multiple_of_the_identity():
    assert hutchinson_variance_bound(3.0, 9.0, 7, "rademacher") == 0
    # A Gaussian one is not, and says so: 2·‖H‖_F²/d² = 2·9·7/49.
    assert hutchinson_variance_bound(3.0, 9.0, 7, "gaussian") == pytest.approx(18 / 7)


def coverage(h, n_probes, repetitions, distribution="rademacher"):
    """How often the truth lies within 1.96 errors of the mean of n probes."""
    rng, size = np.random.default_rng(2), len(h)
    hits = 0
    for _ in range(repetitions):
        u = probes((n_probes, size), distribution, rng)
        hu = u @ h
        means = (u * hu).mean(axis=1)
        bounds = [hutchinson_variance_bound(m, s, size, distribution) for m, s in zip(means, (hu**2).mean(axis=1), strict=True)]
        hits += abs(means.mean() - np.trace(h) / size) <= 1.96 * probe_error(means, bounds)
    return hits / repetitions


# Of 2000 repetitions, a share of 95 % has the error 0.5 %.
@pytest.mark.parametrize("n", [1, 2, 7])
def test_few_probes_cover_at_least_what_they_promise(n):
    assert coverage(symmetric(60), n, 2000) > 0.93


def test_the_spread_of_eight_covers_as_a_t_interval_does():
    # P(|t| ≤ 1.96) with 7 degrees of freedom is 0.909.
    assert coverage(symmetric(60), FEW_PROBES, 2000) == pytest.approx(0.909, abs=0.025)


def test_one_probe_of_a_rank_one_hessian_covers_less_as_the_docstring_says():
    v = np.random.default_rng(3).standard_normal(200)
    # |z² − 1| ≤ 1.96·√2·|z| for Gaussian z: 74 %.
    assert coverage(np.outer(v, v), 1, 4000) == pytest.approx(0.744, abs=0.03)


def test_two_equal_probes_do_not_pass_for_certainty_but_eight_do():
    assert probe_error([1.0] * 2, [4.0] * 2) == pytest.approx(np.sqrt(2))
    assert probe_error([1.0] * FEW_PROBES, [4.0] * FEW_PROBES) == 0
    assert np.isnan(probe_error([], []))
    # A spread above the bound is believed.
    assert probe_error([0.0, 2.0], [0.1, 0.1]) == pytest.approx(1.0)


def test_the_bound_of_bartletts_estimate_is_reached_by_rank_one():
    rng, n = np.random.default_rng(4), 100_000
    for eigenvalues in ([4.0], [1.0, 1.0, 1.0, 1.0]):
        means = (rng.standard_normal((n, len(eigenvalues))) ** 2 * eigenvalues).sum(axis=1) / 4
        ratio = np.var(means) / bartlett_variance_bound(1.0)
        # 2Σλ²/(2(Σλ)²): 1 for one eigenvalue, 1/4 for four equal ones.
        assert ratio == pytest.approx(1 / len(eigenvalues), rel=4 * np.sqrt(14 / n))


def test_noise_is_taken_out_of_the_rms():
    rng, n, d = np.random.default_rng(5), 4, 200_000
    truth = rng.standard_normal(d) * 2
    values = truth + 3 * rng.standard_normal((n, d))
    rms, noise = debiased_rms(float(np.mean(values**2)), float(np.mean(values.mean(axis=0) ** 2)), n)
    assert rms == pytest.approx(2, rel=0.01)  # seen: 0.2 %
    assert noise == pytest.approx(3, rel=0.01)
    assert np.isnan(debiased_rms(1.0, 1.0, 1)).all()
