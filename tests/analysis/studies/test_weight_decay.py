"""Decay against what it should do to simulated weights, decoupled and coupled."""

import numpy as np
import pytest
from scipy.stats import norm

from optiscope.analysis import weight_decay
from optiscope.diagnostics.catalogue import LEVELS

NAMES = [f"layers.{layer}.{part}.weight" for layer in range(3) for part in ("attn.q_proj", "mlp.up_proj")]
BETAS = {"optimizers": [{"label": "AdamW", "groups": [{"betas": [0.9, 0.999]}]}]}
LR, DECAY = 0.002, 0.5


def simulate(beta1, steps=(6000, 6100, 6200)):
    """What is recorded of 4,000 weights with decoupled decay under updates that are averages over `beta1` of white noise."""
    rng = np.random.default_rng(0)
    w, u, records = np.zeros(4000), np.zeros(4000), []
    for t in range(1, max(steps) + 1):
        u = beta1 * u + (1 - beta1) * rng.standard_normal(4000)
        before, w = w, w * (1 - LR * DECAY) - LR * u
        if t in steps:
            rms = lambda x: np.sqrt(np.mean(x**2))  # noqa: E731
            records.append([rms(before), rms(before - w), rms((before * (1 - LR * DECAY) - w) / LR)])
    return dict(zip(("weight_rms", "update_rms", "update_rms_per_lr"), np.array(records).T[:, :, None], strict=True))


def updates(build_run, *, moments=None, **quantities):
    base = {"lr": LR, "weight_decay": DECAY, "weight_rms": 0.1, "update_rms": LR * 0.2, "update_rms_per_lr": 0.2}
    groups = {"update": {**base, **quantities}} | ({"second_moment": moments} if moments else {})
    matrices = {name: {"sigma": (2.0, 1.0), "optimizer": "AdamW"} for name in NAMES}
    return build_run(matrices, steps=(6000, 6100, 6200), groups=groups, attrs=BETAS)


# ηλ of 1e-3 and momentum of 10 steps: the weights' RMS follows the law to (1 + 19)/2·1e-3, 1 %; 4,000 weights scatter by 1.1 %.
@pytest.mark.parametrize(("beta1", "level"), [(0.0, 1.0), (0.9, np.sqrt(19))])
def test_settled_weights_are_at_their_stationary_size(build_run, beta1, level):
    found = weight_decay.study(updates(build_run, **simulate(beta1)))
    np.testing.assert_allclose(found["equilibrium"], level, rtol=0.045)
    # √((1 + β₁)/(1 − β₁)) by the optimizer's betas, where momentum leads.
    np.testing.assert_allclose(found["averaged"], np.sqrt(19))
    # η Σλ from the first to the last record.
    np.testing.assert_allclose(found["decay_times"], 1e-3 * 200)


def test_share_is_decay_over_the_update(build_run):
    run = updates(build_run, update_rms=5e-4, update_rms_per_lr=0.2)
    np.testing.assert_allclose(weight_decay.study(run)["share"], LR * DECAY * 0.1 / 5e-4)


def log_normal_moments(decay_spread):
    z = norm.ppf(np.clip(LEVELS, 1e-6, 1 - 1e-6))
    quantiles = 1e-8 * 10 ** (np.array([1.0, 2.0] * 3)[:, None] * z)
    return {"second_moment_quantile": quantiles, "second_moment_eps": 0.0, "decay_spread": decay_spread}


def test_spread_in_force_and_of_coupled_decay(build_run):
    found = weight_decay.study(updates(build_run, **simulate(0.9), moments=log_normal_moments(0.0)))
    np.testing.assert_array_equal(found["spread"], 0)
    # √v scatters by half the decades of v, between −1.645 and 1.645 standard deviations.
    np.testing.assert_allclose(found["spread_if_coupled"], np.tile(1.6449 * np.array([1.0, 2.0]), (3, 1)), rtol=1e-4)
    text = weight_decay.summary(found)
    assert text.startswith(
        "Every coordinate of a matrix decays at one rate; coupled decay would differ by 2.5 (median; attn_q 1.6 to mlp_up 3.3) decades; decay is "
    )
    coupled = weight_decay.study(updates(build_run, moments=log_normal_moments(np.array([1.6, 3.2] * 3))))
    assert weight_decay.summary(coupled) == "Decay rates of a matrix's coordinates differ by up to 3.2 decades (mlp_up)."
    assert len(weight_decay.plot(coupled).axes) == 1


def test_epsilon_bounds_the_spread(build_run):
    moments = {**log_normal_moments(0.0), "second_moment_eps": 1.0}
    found = weight_decay.study(updates(build_run, **simulate(0.9), moments=moments))
    np.testing.assert_allclose(found["spread_if_coupled"], 0, atol=1e-2)


def test_matrices_without_decay_are_left_out(build_run):
    decay = np.tile([DECAY, 0.0], (3, 3))
    found = weight_decay.study(updates(build_run, weight_decay=decay, **simulate(0.9)))
    assert found["operator"].values.tolist() == ["attn_q"]


def test_refused_with_the_reason(build_run):
    with pytest.raises(ValueError, match=r"^run: no optimizer in it decays weights \(weight_decay is 0 throughout\)"):
        weight_decay.study(updates(build_run, weight_decay=0.0))
    # The update is just its rate times the update without decay: what decays is inside of u.
    with pytest.raises(ValueError, match=r"^run: its weight decay is coupled, .* measure=\(…, 'second_moment'\)"):
        weight_decay.study(updates(build_run))
