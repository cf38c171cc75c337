"""Variance and direction of the corrected gradient: of independent gradients, and of ones that share their noise."""

import numpy as np
import pytest

from optiscope.analysis import gradient_correction

S = 0.025 * 0.95 / (1 - 0.95)  # γβ/(1 − β) of MARS-M
NAMES = [f"layers.{i}.{part}.weight" for i in range(3) for part in ("attn.q_proj", "mlp.up_proj")]


def corrected(shared, seed):
    """Var(C)/Var(G) and cos(C, G) of 200×200 gradients whose predecessor has a share of the noise."""
    rng = np.random.default_rng(seed)
    own, other, both = rng.standard_normal((3, 200, 200))
    g, last = (np.sqrt(1 - shared) * noise + np.sqrt(shared) * both for noise in (own, other))
    c = g + S * (g - last)
    return np.var(c) / np.var(g), np.vdot(c, g) / np.linalg.norm(c) / np.linalg.norm(g)


@pytest.fixture
def run(build_run):
    """Independent gradients for queries, ones that share 90 % for the MLP."""
    values = np.array([[corrected(0.9 if "mlp" in name else 0.0, 10 * t + i) for i, name in enumerate(NAMES)] for t in range(3)])
    groups = {"update": {"correction_variance_ratio": values[..., 0], "correction_cosine": values[..., 1]}}
    return build_run({name: {"sigma": np.ones(4)} for name in NAMES}, groups=groups)


def test_independent_gradients_gain_variance(run):
    found = gradient_correction.study(run)
    assert pytest.approx(0.475) == S
    for operator, shared in (("attn_q", 0.0), ("mlp_up", 0.9)):
        ratio = (1 + S) ** 2 + S**2 - 2 * (1 + S) * S * shared
        cosine = (1 + S - S * shared) / np.sqrt(ratio)
        # 40,000 elements: the ratio scatters by 0.7 %, the cosine by 0.05 %; a median of nine by half of that. Three of those.
        assert float(found["median_variance_ratio"].sel(operator=operator)) == pytest.approx(ratio, rel=0.011)
        assert float(found["median_cosine"].sel(operator=operator)) == pytest.approx(cosine, rel=0.001)
    assert float(found["median_variance_ratio"].sel(operator="attn_q")) == pytest.approx(2.40, abs=0.03)


def test_the_summary_tells_both(run):
    found = gradient_correction.study(run)
    low, high = (f"{float(found['median_variance_ratio'].sel(operator=o)):.3g}" for o in ("mlp_up", "attn_q"))
    text = gradient_correction.summary(found)
    assert text.startswith("The variance of the corrected gradient over that of the plain one is ")
    assert f"(median; mlp_up {low} to attn_q {high}), their cosine 0.9" in text


def test_gaps_are_left_out(run):
    whole = gradient_correction.study(run)
    run["update"]["correction_variance_ratio"][0, :2] = np.nan
    found = gradient_correction.study(run)
    values = run["update"]["correction_variance_ratio"].values
    assert float(found["variance_ratio"].sel(operator="attn_q")[0]) == pytest.approx(np.median(values[0, [2, 4]]), rel=1e-6)
    assert found["variance_ratio"][1:].equals(whole["variance_ratio"][1:])


def test_what_is_missing_is_said(build_run):
    run = build_run({NAMES[0]: {"sigma": np.ones(4)}})
    with pytest.raises(ValueError, match=r"^run: no optimizer in it corrects the gradient \(MARS and MARS-M do\)"):
        gradient_correction.study(run)
    run["update"] = run["update"].to_dataset().drop_vars("correction_cosine")
    with pytest.raises(ValueError, match=r"^run: recorded by an earlier version, without correction_cosine"):
        gradient_correction.study(run)
