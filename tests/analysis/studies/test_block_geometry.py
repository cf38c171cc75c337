"""Blocks beside the whole: medians per kind, and how far apart the blocks of one matrix are."""

import numpy as np
import pytest

from optiscope.analysis import block_geometry
from optiscope.analysis.shape_null import null_log10_condition

STEPS = 3


def fused(layer):
    return f"layers.{layer}.attn.qkv.weight"


@pytest.fixture
def base(build_run):
    return build_run({fused(i): {"sigma": np.linspace(1, 0.1, 8), "shape": (24, 8)} for i in range(4)})


def block(kappa, rms=0.2, shape=(8, 8), operator="attn_q"):
    return {
        "shape": shape, "operator": operator, "block_condition_number": kappa, "block_stable_rank": 3.0, "block_update_rms_per_lr": rms,
    }  # fmt: skip


@pytest.fixture
def run(base, add_rows):
    """κ of query, key and value is 10, 100 and 1000 in all layers; of two heads of the queries 2 and 4·(layer + 1)."""
    rows = {}
    for i in range(4):
        for letter, kappa in (("q", 10.0), ("k", 100.0), ("v", 1000.0)):
            rows[f"{fused(i)}[{letter}]"] = block(kappa, operator=f"attn_{letter}", rms=0.2 if letter != "v" else 0.4)
        for head, kappa in ((0, 2.0), (1, 4.0 * (i + 1))):
            rows[f"{fused(i)}[q head {head}]"] = block(kappa, shape=(4, 8))
    return add_rows(base, "blocks", rows)


def test_kinds_of_blocks_stand_under_the_whole(run):
    found = block_geometry.study(run)
    assert found["kind"].values.tolist() == ["attn_qkv whole", "attn_qkv q", "attn_qkv k", "attn_qkv v", "attn_qkv q head"]
    # Heads: 2 four times and 4, 8, 12, 16.
    np.testing.assert_allclose(found["condition_number"], [10, 10, 100, 1000, 3], rtol=1e-6)
    np.testing.assert_allclose(found["condition_number_low"][[1, 2, 3]], [10, 100, 1000])
    # A resample has as many 2s as others, and of these at least a 4: no median is below 3, and without the first layer it is 5 or more.
    low, high = (float(found[f"condition_number_{end}"].sel(kind="attn_qkv q head")) for end in ("low", "high"))
    assert low == pytest.approx(3)
    assert 5 <= high <= 9
    whole = run["update"]["update_rms_per_lr"].values
    np.testing.assert_allclose(found["update_rms_per_lr"], [whole[0, 0], 0.2, 0.2, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(found["stable_rank"][1:], 3, rtol=1e-6)
    null = {kind: 10 ** null_log10_condition(*shape) for kind, shape in (("attn_qkv q", (8, 8)), ("attn_qkv q head", (4, 8)))}
    for kind, expected in null.items():
        assert float(found["null"].sel(kind=kind)) == pytest.approx(expected)


def test_spreads_are_within_a_matrix(run):
    found = block_geometry.study(run)
    assert found["family"].values.tolist() == ["attn_qkv parts", "attn_qkv heads"]
    # Parts: 1000 over 10. Heads: 2, 4, 6 and 8 in the four layers, in decades.
    np.testing.assert_allclose(found["condition_spread"], [2, np.median(np.log10([2, 4, 6, 8]))], rtol=1e-6)
    np.testing.assert_allclose(found["update_spread"], [np.log10(2), 0], atol=1e-7)
    text = block_geometry.summary(found)
    assert "in condition number by a factor of 100 (attn_qkv parts)" in text
    assert "in the size of their updates by a factor of 2 (attn_qkv parts)" in text


def test_heads_of_a_projection_of_its_own(build_run, add_rows):
    name = "layers.0.attn.q_proj.weight"
    run = build_run({name: {"sigma": np.linspace(1, 0.1, 8)}})
    kappa = np.array([10.0, np.nan, 30.0])  # a gap
    run = add_rows(run, "blocks", {f"{name}[head {i}]": block(kappa * (i + 1), shape=(2, 8)) for i in range(4)})
    found = block_geometry.study(run)
    assert found["kind"].values.tolist() == ["attn_q whole", "attn_q head"]
    np.testing.assert_allclose(found["block_condition_number"], [20, 40, 60, 80], rtol=1e-6)
    np.testing.assert_allclose(found["condition_number"], [10, 50], rtol=1e-6)
    np.testing.assert_allclose(found["condition_spread"], [np.log10(4)], rtol=1e-6)
    # One layer says nothing about others.
    assert np.isnan(found["condition_number_low"]).all()


def test_without_the_whole_the_blocks_remain(run):
    whole = block_geometry.study(run)
    del run["geometry"], run["update"]
    found = block_geometry.study(run)
    assert found["kind"].equals(whole["kind"])
    assert found["condition_number"][1:].equals(whole["condition_number"][1:])
    assert np.isnan(found["condition_number"].sel(kind="attn_qkv whole"))


def test_one_block_per_matrix_leaves_nothing_to_compare(base, add_rows):
    run = add_rows(base, "blocks", {f"{fused(0)}[q]": block(10.0)})
    assert block_geometry.summary(block_geometry.study(run)).startswith("Every matrix in this run has one block")


def test_what_is_missing_is_said(base, add_rows):
    with pytest.raises(ValueError, match=r"^run: no blocks records; to record them, attach with measure=\(…, 'blocks'\)"):
        block_geometry.study(base)
    with pytest.raises(ValueError, match=r"^run: no block in it has a spectrum"):
        block_geometry.study(add_rows(base, "blocks", {f"{fused(0)}[q]": {"shape": (8, 8)}}))
