"""Adam-mini's blocks, and what one learning rate for each of them would lose."""

import numpy as np
import pytest

from optiscope.diagnostics.catalogue import BLOCK_STATISTICS, PARTITIONS
from optiscope.diagnostics.operators import OPERATORS
from optiscope.diagnostics.quantities.adam_mini import row_blocks, within_blocks


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("heads", [(0, 0), (4, 2), (4, 4), (7, 7)])
def test_every_row_has_a_block_and_blocks_are_counted_in_order(operator, heads):
    name, blocks = row_blocks(operator, 64, 16, heads)
    assert name in PARTITIONS
    assert blocks.shape == (64,)
    assert blocks[0] == 0
    assert set(np.diff(blocks)) <= {0, 1}


@pytest.mark.parametrize(
    ("operator", "name", "sizes"),
    [
        ("attn_q", "head", [16] * 4),
        ("attn_k", "head", [32] * 2),
        ("attn_v", "row", [1] * 64),
        ("attn_o", "row", [1] * 64),
        ("mlp_up", "row", [1] * 64),
        ("conv", "row", [1] * 64),
        ("other", "row", [1] * 64),
        ("embed", "token", [1] * 64),
        ("head", "token", [1] * 64),
        ("norm", "whole", [64]),
        ("attn_qkv", "head", [8] * 6 + [1] * 16),  # (4 + 2·2) heads of 8 rows
    ],
)
def test_blocks_are_those_of_the_paper(operator, name, sizes):
    found, blocks = row_blocks(operator, 64, 16, (4, 2))
    assert found == name
    assert np.bincount(blocks).tolist() == sizes


def test_a_head_of_a_square_projection_has_d_squared_over_h_numbers():
    _, blocks = row_blocks("attn_q", 768, 768, (12, 12))
    assert set(np.bincount(blocks) * 768) == {768**2 // 12}


def test_heads_that_are_not_known_or_do_not_divide_fall_back_to_rows():
    for heads in ((0, 0), (5, 5)):
        name, blocks = row_blocks("attn_q", 64, 16, heads)
        assert (name, blocks.tolist()) == ("row", list(range(64)))


def naive(v, blocks, m):
    """Block by block, over elements with v > 0."""
    logs, variances, cv2, ratios = [], [], [], []
    steps = {name: np.zeros_like(m) for name in BLOCK_STATISTICS}
    for b in range(blocks.max() + 1):
        rows = blocks == b
        block = v[rows]
        positive = block[block > 0]
        if not len(positive):
            continue
        logs.append(np.log(positive).mean())
        variances.append(np.log(positive).var())
        cv2.append(block.var() / block.mean() ** 2)
        ratios += list(np.sqrt(block.mean() / positive))
        of_block = {"mean": block.mean(), "max": block.max(), "min": positive.min(), "norm": np.linalg.norm(block)}
        for name, value in of_block.items():
            steps[name][rows] = m[rows] / np.sqrt(value)
    used = v > 0
    single = m[used] / np.sqrt(v[used])
    cosines = [single @ steps[name][used] / np.linalg.norm(single) / np.linalg.norm(steps[name][used]) for name in BLOCK_STATISTICS]
    within = np.mean(variances)
    return np.sqrt(within), np.var(logs) / within, np.mean(cv2), np.mean(ratios), np.array(cosines)


def moments(rows, cols, tau=1.5, seed=0):
    generator = np.random.default_rng(seed)
    v = np.exp(tau * generator.standard_normal((rows, cols)) - 20 + 0.5 * np.arange(rows)[:, None] / rows)
    return v, generator.standard_normal((rows, cols)) * np.sqrt(v)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("operator", ["attn_q", "attn_qkv", "mlp_up"])
def test_against_blocks_one_by_one(operator, zeros):
    v, m = moments(64, 48)
    v[np.random.default_rng(1).random(v.shape) < zeros] = 0
    v[3] = 0 if zeros else v[3]
    _, blocks = row_blocks(operator, 64, 48, (4, 2))
    found = within_blocks(v, blocks, m)
    dispersion, ratio, cv2, step, cosine = naive(v, blocks, m)
    # Largest relative difference measured: 1.1e-14, of float64 sums in another order.
    assert (found.dispersion, found.variance_ratio, found.step_ratio) == pytest.approx((dispersion, ratio, step), rel=1e-12)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-12)
    assert found.cv2 == pytest.approx(cv2, rel=1e-12)
    single = within_blocks(v.astype(np.float32), blocks, m.astype(np.float32))
    assert single.dispersion == pytest.approx(dispersion, rel=1e-5)
    np.testing.assert_allclose(single.cosine, cosine, rtol=1e-5)


def test_blocks_of_one_coordinate_are_adam():
    v, m = moments(500, 1)
    found = within_blocks(v, row_blocks("mlp_up", 500, 1)[1], m)
    assert (found.dispersion, found.cv2) == (0.0, 0.0)
    assert found.step_ratio == pytest.approx(1, rel=1e-14)
    np.testing.assert_allclose(found.cosine, 1, rtol=1e-14)
    assert np.isnan(found.variance_ratio)  # over a variance of zero


@pytest.mark.parametrize("tau", [0.3, 0.7, 1.0])
def test_log_normal_blocks_have_the_closed_forms(tau):
    """e^{3τ²/8} and e^{−τ²/8}; N = 2¹⁹, seed 11. Bounds are 5 standard deviations of the means, from the same draws."""
    generator = np.random.default_rng(11)
    v = np.exp(tau * generator.standard_normal((512, 1024)))
    m = generator.standard_normal(v.shape) * np.sqrt(v)
    found = within_blocks(v, np.zeros(512, dtype=np.int64), m)
    spread = 5 / np.sqrt(v.size)
    assert found.dispersion == pytest.approx(tau, rel=spread)
    assert found.step_ratio == pytest.approx(
        np.exp(3 * tau**2 / 8), rel=spread * (np.std(v**-0.5) / np.mean(v**-0.5) + np.std(v) / np.mean(v))
    )
    assert found.cosine[0] == pytest.approx(np.exp(-(tau**2) / 8), rel=spread * np.std(m * m / np.sqrt(v)) / np.mean(m * m / np.sqrt(v)))
    assert found.cv2 == pytest.approx(np.exp(tau**2) - 1, rel=spread * np.std((v - v.mean()) ** 2) / np.var(v))
    assert np.isnan(found.variance_ratio)  # one block


def test_every_statistic_of_one_block_gives_the_same_direction():
    v, m = moments(32, 16)
    cosine = within_blocks(v, np.zeros(32, dtype=np.int64), m).cosine
    np.testing.assert_allclose(cosine, cosine[0], rtol=1e-13)
    # Between blocks they differ.
    assert np.ptp(within_blocks(v, row_blocks("mlp_up", 32, 16)[1], m).cosine) > 1e-3


def test_a_common_factor_of_v_changes_nothing():
    v, m = moments(24, 10)
    _, blocks = row_blocks("attn_q", 24, 10, (3, 3))
    one, other = within_blocks(v, blocks, m), within_blocks(v / 0.003, blocks, m / 0.1)
    for field in ("dispersion", "variance_ratio", "cv2", "step_ratio", "cosine"):
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), rtol=1e-10)


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_nothing_is_said_of_zero_or_what_is_not_finite(fill):
    found = within_blocks(np.full((4, 3), fill), np.arange(4), np.ones((4, 3)))
    assert np.isnan([found.dispersion, found.cv2, found.step_ratio, *found.cosine]).all()


def test_without_a_first_moment_only_the_cosine_is_missing():
    v, _ = moments(8, 8)
    found = within_blocks(v, np.arange(8))
    assert np.isnan(found.cosine).all()
    assert np.isfinite([found.dispersion, found.variance_ratio, found.cv2, found.step_ratio]).all()
