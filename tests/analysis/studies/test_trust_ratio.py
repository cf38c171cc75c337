"""The ratio of LAMB's rule from updates of known size, its spread, and the ratio in force."""

import numpy as np
import pytest

from optiscope.analysis import trust_ratio

NAMES = [f"layers.{layer}.{part}.weight" for layer in range(4) for part in ("attn.q_proj", "mlp.up_proj")]


def updates(build_run, *, optimizer="AdamW", **quantities):
    return build_run({name: {"sigma": (2.0, 1.0), "optimizer": optimizer} for name in NAMES}, groups={"update": quantities}, lr=0.5)


def test_the_ratio_is_weights_over_update_per_learning_rate(build_run):
    norms = np.array([1.0, 2, 4, 8, 16, 32, 64, 128])  # of W; U of norm 4, η = 0.5
    step = np.tile(0.5 * 4 / norms, (3, 1))
    step[0] *= 2
    step[2] = np.nan
    found = trust_ratio.study(updates(build_run, update_to_weight=step))
    np.testing.assert_allclose(found["ratio"], norms / 4 * 0.75)
    np.testing.assert_allclose(found["ratio_lower"], norms / 4 * 0.625)
    # 5 % and 95 % of eight values that double: between the first and the last two.
    ratios = norms / 4
    np.testing.assert_allclose(found["spread"].sel(of="AdamW")[1], np.log10(np.quantile(ratios, 0.95) / np.quantile(ratios, 0.05)))
    assert np.isnan(found["trust"]).all()
    assert len(trust_ratio.plot(found).axes) == 2


def test_under_lamb_the_ratio_is_the_one_in_force(build_run):
    # ‖ΔW‖ = η‖W‖ whatever the gradients (reference: LAMB with φ = id), so that only the recorded ratio tells ‖W‖/‖U‖.
    trust = np.tile(np.arange(1.0, 9.0), (3, 1))
    found = trust_ratio.study(updates(build_run, optimizer="Lamb", update_to_weight=0.5, trust_ratio=trust))
    np.testing.assert_allclose(found["ratio"], trust[0])
    np.testing.assert_allclose(found["trust"].sel(kind="mlp_up"), 5.0)
    assert len(trust_ratio.plot(found).axes) == 3


def test_clipped_ratios_are_told_by_their_being_the_same(build_run):
    trust = np.tile(np.arange(1.0, 9.0), (3, 1)) + np.arange(3)[:, None] / 10
    assert trust_ratio.study(updates(build_run, update_to_weight=0.5, trust_ratio=trust))["at_bound"].values.tolist() == [0]
    clipped = trust_ratio.study(updates(build_run, update_to_weight=0.5, trust_ratio=np.minimum(trust, 6.0)))
    assert clipped["at_bound"].values.tolist() == [9 / 24]
    assert "; 38% of the trust ratios of AdamW are at a bound." in trust_ratio.summary(clipped)


def test_runs_of_earlier_versions_have_no_trust_ratio(build_run):
    run = updates(build_run, update_to_weight=0.1)
    del run["update"]["trust_ratio"]
    found = trust_ratio.study(run)
    np.testing.assert_allclose(found["ratio"], 5)
    assert "bound" not in trust_ratio.summary(found)


def test_refused_with_the_reason(build_run):
    with pytest.raises(ValueError, match=r"^run: no update in it is finite and of weights that are not zero"):
        trust_ratio.study(updates(build_run, update_to_weight=np.nan))
