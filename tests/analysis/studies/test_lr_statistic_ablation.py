"""Which statistic comes closest, where blocks can tell, and where they cannot."""

import numpy as np
import pytest

from optiscope.analysis import lr_statistic_ablation
from optiscope.diagnostics.catalogue import BLOCK_STATISTICS

NAMES = [f"layers.{layer}.{part}.weight" for layer in range(4) for part in ("attn.q_proj", "mlp.up_proj")]


def moments(build_run, cosine):
    matrices = {name: {"sigma": (2.0, 1.0), "optimizer": "AdamW"} for name in NAMES}
    return build_run(matrices, groups={"second_moment": {"block_cosine": cosine}})


def test_medians_intervals_and_the_best(build_run):
    cosine = np.zeros((3, 8, 4))
    cosine[:, 0::2] = [0.9, 0.6, 0.5, 0.8]
    cosine[:, 0::2, 0] += [0, 0.01, 0.02, 0.03]
    cosine[:, 1::2] = [0.7, 0.6, 0.5, 0.8]
    found = lr_statistic_ablation.study(moments(build_run, cosine))
    assert tuple(found["statistic"].values) == BLOCK_STATISTICS
    np.testing.assert_allclose(found["cosine"].sel(operator="attn_q"), [0.915, 0.6, 0.5, 0.8], rtol=1e-6)
    one = found.sel(operator="attn_q", statistic="mean")
    assert 0.8999 < float(one["cosine_low"]) < 0.915 < float(one["cosine_high"]) < 0.9301
    assert found["best"].values.tolist() == ["mean", "norm"]
    assert lr_statistic_ablation.summary(found).startswith(
        "Cosine with Adam's update, median over operators: mean 0.81, max 0.60, min 0.50, norm 0.80;"
    )


def test_a_single_block_cannot_tell(build_run):
    # One factor on the whole matrix turns no vector: m/√s has one direction for every s.
    rng = np.random.default_rng(0)
    m, v = rng.standard_normal(50), rng.lognormal(size=50)
    adam = m / np.sqrt(v)
    cosine = [
        adam @ u / np.linalg.norm(adam) / np.linalg.norm(u)
        for u in (m / np.sqrt(s) for s in (v.mean(), v.max(), v.min(), np.linalg.norm(v)))
    ]
    found = lr_statistic_ablation.study(moments(build_run, np.array(cosine)))
    assert found["best"].values.tolist() == ["none", "none"]
    assert lr_statistic_ablation.summary(found).endswith("all statistics do the same (one block, or equal blocks).")


def test_bars_stand_for_every_operator_and_statistic(build_run):
    cosine = np.tile([0.9, 0.6, np.nan, -0.2], (3, 8, 1))
    figure = lr_statistic_ablation.plot(lr_statistic_ablation.study(moments(build_run, cosine)))
    heights = [
        [bar.get_height() for bar in bars] for bars in figure.axes[0].containers if len(bars) == 2 and hasattr(bars[0], "get_height")
    ]
    np.testing.assert_allclose(heights, np.repeat([[0.9], [0.6], [np.nan], [-0.2]], 2, axis=1), rtol=1e-6)
    assert figure.axes[0].get_ylim()[0] <= -0.2


def test_refused_with_the_reason(build_run):
    with pytest.raises(ValueError, match=r"^run: no optimizer in it keeps a first and a second moment of every coordinate"):
        lr_statistic_ablation.study(moments(build_run, np.nan))
