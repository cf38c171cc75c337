"""√v̂ against ε and |m̂|/√v̂ against noise, on quantiles of known laws and on simulated moments."""

import numpy as np
import pytest
from scipy.stats import norm

from optiscope.analysis import second_moment
from optiscope.diagnostics.catalogue import LEVELS, SECOND_MOMENT_FORMS

Z = norm.ppf(np.clip(LEVELS, 1e-6, 1 - 1e-6))
NAMES = [f"layers.{layer}.{part}.weight" for layer in range(4) for part in ("attn.q_proj", "mlp.up_proj")]
BETAS = {"optimizers": [{"label": "AdamW", "groups": [{"betas": [0.9, 0.999]}, {"betas": [0.9, 0.999]}]}]}


def moments(build_run, *, attrs=BETAS, names=NAMES, **quantities):
    """Log-normal v̂ with median 1e-8·4^layer and a spread of one decade, two for mlp_up; other quantities as given."""
    median = np.array([1e-8 * 4.0 ** int(name.split(".")[1]) for name in names])
    spread = np.array([2.0 if "up" in name else 1.0 for name in names])
    groups = {
        "second_moment": {
            "second_moment_form": 0, "second_moment_quantile": median[:, None] * 10 ** (spread[:, None] * Z), "second_moment_eps": 1e-8,
            "snr_quantile": 0.2 * np.abs(norm.ppf((1 + np.clip(LEVELS, 1e-6, 1 - 1e-6)) / 2)), "eps_share": 0.0, "near_eps_share": 0.1, **quantities,
        }
    }  # fmt: skip
    return build_run({name: {"sigma": (2.0, 1.0), "optimizer": "AdamW"} for name in names}, groups=groups, attrs=attrs)


def test_quantiles_are_those_of_the_law(build_run):
    found = second_moment.study(moments(build_run))
    for operator, spread in (("attn_q", 1), ("mlp_up", 2)):
        for suffix, level in (("_lower", 0.05), ("", 0.5), ("_upper", 0.95)):
            # Over layers 0 to 3 the median lies between 4 and 16 times the first.
            expected = np.median([np.sqrt(1e-8 * 4.0**layer * 10 ** (spread * norm.ppf(level))) for layer in range(4)])
            np.testing.assert_allclose(found[f"root{suffix}"].sel(operator=operator), expected, rtol=1e-6)  # stored in float32
    np.testing.assert_allclose(found["snr"], 0.2 * norm.ppf(0.75), rtol=1e-6)
    np.testing.assert_array_equal(found["eps"], [1e-8, 1e-8])


def test_noise_and_bound_are_what_moments_of_gradients_give(build_run):
    found = second_moment.study(moments(build_run)).sel(operator="attn_q")
    rng = np.random.default_rng(0)
    m, v = np.zeros(4000), np.zeros(4000)
    for _ in range(8000):
        g = rng.standard_normal(4000)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    # The median of 0.2294·|z| over 4,000 coordinates has a standard error of 0.2294·0.787/√4000 = 0.0029.
    assert float(np.median(np.abs(m / np.sqrt(v)))) == pytest.approx(float(found["noise"]), abs=4 * 0.0029)
    for beta2, bound in ((0.999, 7.270), (0.95, 1.165)):
        m = v = 0.0
        for i in range(2000, -1, -1):
            g = (0.9 / beta2) ** i
            m, v = 0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g * g
        assert m / np.sqrt(v) == pytest.approx(second_moment.snr_bound(0.9, beta2), rel=1e-9)
        assert second_moment.snr_bound(0.9, beta2) == pytest.approx(bound, abs=5e-4)
    assert float(found["bound"]) == pytest.approx(7.270, abs=5e-4)


def test_shares_are_medians_with_intervals_and_the_worst_record(build_run):
    share = np.zeros((3, 8))
    share[:, 0::2] = [0.1, 0.2, 0.3, 0.4]
    share[1, 2] = 0.9
    found = second_moment.study(moments(build_run, eps_share=share)).sel(operator="attn_q")
    # Layer 1 has 0.2, 0.9, 0.2: its median stays.
    assert float(found["eps_share"]) == pytest.approx(0.25)
    assert float(found["eps_share_low"]) < 0.25 < float(found["eps_share_high"])
    assert float(found["largest_eps_share"]) == pytest.approx(0.9)
    text = second_moment.summary(second_moment.study(moments(build_run, eps_share=share)))
    assert "√v̂ < ε holds for 25.0% of the coordinates of the operator with most, for 90.0% in the worst record (attn_q)" in text


def test_betas_that_differ_or_are_not_known_give_no_theory(build_run):
    other = {"optimizers": [{"label": "AdamW", "groups": [{"betas": [0.9, 0.999]}, {"betas": [0.8, 0.999]}]}]}
    for attrs in (other, {}):
        found = second_moment.study(moments(build_run, attrs=attrs))
        assert np.isnan(found["noise"]).all()
        assert np.isnan(found["bound"]).all()
        assert "noise alone" not in second_moment.summary(found)


def test_what_is_no_mean_of_squared_gradients_is_left_out(build_run):
    form = np.full((3, 8), SECOND_MOMENT_FORMS.index("hessian"))
    with pytest.raises(ValueError, match=r"^run: no optimizer in it keeps a second moment of its gradients"):
        second_moment.study(moments(build_run, second_moment_form=form))
    form[:, 0::2] = 0
    assert second_moment.study(moments(build_run, second_moment_form=form))["operator"].values.tolist() == ["attn_q"]


def test_only_panels_that_hold_something(build_run):
    full = second_moment.plot(second_moment.study(moments(build_run)))
    assert len(full.axes) == 3
    dataset = second_moment.study(moments(build_run, snr_quantile=np.nan))
    assert len(second_moment.plot(dataset).axes) == 2
    assert "|m̂|" not in second_moment.summary(dataset)
    dataset = second_moment.study(
        moments(build_run, snr_quantile=np.nan, second_moment_eps=np.nan, eps_share=np.nan, near_eps_share=np.nan)
    )
    assert len(second_moment.plot(dataset).axes) == 1
    assert "ε" not in second_moment.summary(dataset)


def test_a_run_without_second_moments_says_how_to_record_them(build_run):
    run = build_run({NAMES[0]: {"sigma": (2.0, 1.0)}})
    with pytest.raises(ValueError, match=r"^run: no second_moment records; to record them, attach with measure=\(…, 'second_moment'\)$"):
        second_moment.study(run)
