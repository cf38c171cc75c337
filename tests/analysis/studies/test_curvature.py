"""Studies of curvature on built runs with a known answer, and what they say where nothing was recorded."""

import numpy as np
import pytest

from optiscope.analysis import hdiag_quality, hessian_blocks, precond_effect, sharpness

NAMES = [f"layers.{i}.{part}.weight" for i in range(3) for part in ("attn.q_proj", "mlp.up_proj")]
MATRICES = {name: {"sigma": (2.0, 1.0), "shape": (4, 8)} for name in NAMES}
STUDIES = (sharpness, hdiag_quality, hessian_blocks, precond_effect)


def padded(values, size):
    return np.concatenate([values, np.full((*values.shape[:-1], size - values.shape[-1]), np.nan)], axis=-1)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.__name__.split(".")[-1])
def test_nothing_recorded_says_what_to_call(study, build_run):
    with pytest.raises(
        ValueError, match=r"^run: no curvature records; to record them, call recorder.curvature\(loss_fn\) from time to time$"
    ):
        study.study(build_run(MATRICES))
    with pytest.raises(ValueError, match=r"recorder\.curvature"):
        study.study(build_run(MATRICES, groups={"curvature": {}}))


def test_sharpness_weighs_matrices_by_their_size_and_adds_their_errors(build_run):
    matrices = {NAMES[0]: {"sigma": (2.0, 1.0), "shape": (4, 8)}, NAMES[2]: {"sigma": (2.0, 1.0), "shape": (8, 12)}}
    run = build_run(matrices, groups={"curvature": {"hessian_mean": [1.0, 3.0], "hessian_mean_error": [0.2, 0.1]}})
    found = sharpness.study(run).sel(operator="attn_q")
    np.testing.assert_allclose(found["hessian"], (32 * 1 + 96 * 3) / 128)
    np.testing.assert_allclose(found["hessian_error"], np.sqrt(2 * ((32 * 0.2) ** 2 + (96 * 0.1) ** 2)) / 128)
    assert "attn_q (2.5" in sharpness.summary(sharpness.study(run))


def test_scatter_falls_as_one_over_root_n(build_run):
    means = 1 + 0.5 * np.random.default_rng(0).standard_normal((3, 6, 64))
    exact = {"exact_mean": 1.0, "exact_hutchinson_mean": 1.25, "exact_hutchinson_error": 0.5, "hessian_mean": 1.0}
    found = hdiag_quality.study(build_run(MATRICES, groups={"curvature": {"hessian_probe_mean": means, **exact}}))
    # 9 matrices and records an operator, of 64 probes and of 4 groups of 16: errors of 3 % and 14 %.
    np.testing.assert_allclose(found["hutchinson"].sel(probes=1), 0.5, rtol=0.1)
    np.testing.assert_allclose(found["hutchinson"].sel(probes=16), 0.125, rtol=0.4)
    np.testing.assert_allclose(found["bias_hutchinson"], 0.25)
    np.testing.assert_allclose(found["bias_error_hutchinson"], np.sqrt(2 * 9 * 0.25) / 9)
    assert "within 2 standard errors for 2 of 2 operators" in hdiag_quality.summary(found)


def test_shares_and_the_map_of_the_operator_furthest_above_its_null(build_run):
    share = np.where([("q_proj" in name) for name in NAMES], 0.9, 0.3)
    tiles = padded(np.tile(np.array([0.0, -np.inf, -np.inf, 1.0]), (3, 6, 1)), 256)
    dominance = padded(np.full((3, 6, 2), 0.5), 8)
    given = {"hessian_in_block_share": share, "hessian_in_block_null": 0.25, "hessian_in_block_error": 0.01, "hessian_map": tiles}
    found = hessian_blocks.study(build_run(MATRICES, groups={"curvature": {**given, "preconditioning_dominance": dominance}}))
    assert found["share"].sel(operator="attn_q") == pytest.approx(0.9)
    assert found["null"].sel(operator="mlp_up") == pytest.approx(0.25)
    assert found.attrs["map_rows"] == 2
    assert "q_proj" in found.attrs["map_of"]
    np.testing.assert_array_equal(found["map"], [[0, -np.inf], [-np.inf, 1]])
    hessian_blocks.plot(found).draw_without_rendering()
    assert "90% of ‖H‖_F² for attn_q (25.0% if spread evenly)" in hessian_blocks.summary(found)


def test_the_effect_of_preconditioning_per_block(build_run):
    ratio = padded(np.tile(np.array([0.1, 10.0]), (3, 6, 1)), 8)
    run = build_run(
        MATRICES, groups={"curvature": {"preconditioning_ratio": ratio, "preconditioning_condition": 100.0, "preconditioning_size": 8.0}}
    )
    found = precond_effect.study(run)
    assert found.sizes["block"] == 36
    assert set(found["size"].values) == {8}
    np.testing.assert_allclose(found["hurt"], 0.5)
    np.testing.assert_allclose(found["median"], 1.0, rtol=1e-6)
    assert "it is worse for 50% of them" in precond_effect.summary(found)
