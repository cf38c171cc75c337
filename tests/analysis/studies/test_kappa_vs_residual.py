"""Correlations against SciPy on pairs that are put together by hand."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from optiscope.analysis import kappa_vs_residual
from optiscope.analysis.shape_null import null_log10_condition
from optiscope.diagnostics.bootstrap import layer_interval

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
# The predicted residual is stored as float32: correlations of it move by less than 1e-7.
STORED = 1e-6


def pairs(matrices, output):
    """(log10 κ, log10 of shape alone, log10 σ_1/σ_.95r, residual, operator) of every recorded spectrum."""
    for name, matrix in matrices.items():
        for sigma in matrix["sigma"]:
            if sigma is not None and not matrix.get("floor"):
                o = output(sigma / np.linalg.norm(sigma), JORDAN)
                log = np.log10(sigma)
                # Ranks up to 64 are stored whole, so the quantile is that of the spectrum itself.
                spread = log.max() - np.quantile(log, 0.05)
                null = null_log10_condition(*matrix["shape"])
                yield np.log10(sigma.max() / sigma.min()), null, spread, np.sqrt(np.mean((1 - o**2) ** 2)), name.split(".")[-2]


def test_correlations_are_scipys(model, model_run, output):
    kappa, null, spread, residual, operator = (np.array(column) for column in zip(*pairs(model, output), strict=True))
    found = kappa_vs_residual.study(model_run)
    assert len(kappa) == int(found["pairs"]) == 54
    for predictor, values in {"log10_kappa": kappa, "log10_kappa_excess": kappa - null, "log10_spread": spread}.items():
        assert float(found["pearson"].sel(predictor=predictor)) == pytest.approx(pearsonr(values, residual).statistic, abs=STORED)
        assert float(found["spearman"].sel(predictor=predictor)) == pytest.approx(spearmanr(values, residual).statistic, abs=STORED)
    for own, name in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("up_proj", "mlp_up")):
        expected = pearsonr(kappa[operator == own], residual[operator == own]).statistic
        assert float(found["pearson_within_operator"].sel(of_operator=name)) == pytest.approx(expected, abs=STORED)


def test_bounds_on_kappa_are_left_out(model, build_run, output):
    name = "layers.1.attn.q_proj.weight"
    bounded = {**model, name: {**model[name], "floor": True}}
    found = kappa_vs_residual.study(build_run(bounded, steps=range(6)))
    kappa, _, _, residual, _ = (np.array(column) for column in zip(*pairs(bounded, output), strict=True))
    assert (int(found["pairs"]), int(found["floors"])) == (48, 6)
    assert float(found["pearson"].sel(predictor="log10_kappa")) == pytest.approx(pearsonr(kappa, residual).statistic, abs=STORED)
    # They are still among the points of the figure.
    assert int(np.isfinite(found["residual"]).sum()) == 54


def test_missing_records_and_other_optimizers_are_left_out(model, build_run, output):
    name, other = "layers.0.attn.k_proj.weight", "layers.2.mlp.up_proj.weight"
    gappy = {**model, name: {**model[name], "sigma": [None, *model[name]["sigma"][1:]]}}
    never = {"layers.1.attn.o_proj.weight": {"sigma": [None] * 6, "shape": (8, 8)}}
    found = kappa_vs_residual.study(build_run({**gappy, **never, other: {**model[other], "optimizer": "AdamW"}}, steps=range(6)))
    rest = {key: matrix for key, matrix in gappy.items() if key != other}
    kappa, _, _, residual, _ = (np.array(column) for column in zip(*pairs(rest, output), strict=True))
    assert int(found["pairs"]) == len(kappa) == 47
    assert float(found["pearson"].sel(predictor="log10_kappa")) == pytest.approx(pearsonr(kappa, residual).statistic, abs=STORED)


def test_too_few_pairs_give_no_number(build_run):
    found = kappa_vs_residual.study(build_run({"layers.0.attn.q_proj.weight": {"sigma": (2.0, 1.0)}}))
    assert np.isnan(found["pearson"]).all()
    assert kappa_vs_residual.summary(found).startswith("Too few snapshots with a measured κ to correlate it with the residual: 3,")
    assert "r =" not in kappa_vs_residual.plot(found).axes[0].get_title()


def test_the_interval_of_r_is_the_bootstrap_of_whole_layers_written_out(model_run):
    """Against numpy's correlation of every resample's pairs."""
    dataset = kappa_vs_residual.study(model_run)
    layers = dataset["layer"].values
    x, y = (np.where(dataset["is_floor"].values, np.nan, dataset[name].values) for name in ("log10_kappa", "residual"))

    def r(chosen):
        a, b = x[:, chosen].ravel(), y[:, chosen].ravel()
        known = np.isfinite(a) & np.isfinite(b)
        return np.corrcoef(a[known], b[known])[0, 1]

    found = [float(dataset[name].sel(predictor="log10_kappa")) for name in ("pearson_low", "pearson_high")]
    # Sums of some hundred terms about their mean: 1e-12 measured.
    np.testing.assert_allclose(found, layer_interval(r, layers), rtol=1e-9)
