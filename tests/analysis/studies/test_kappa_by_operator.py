"""Medians, quartiles and the excess over shape, against NumPy on the spectra themselves."""

import numpy as np
import pytest

from optiscope.analysis import kappa_by_operator
from optiscope.analysis.shape_null import null_log10_condition

OPERATORS = {"attn_q": "q_proj", "attn_k": "k_proj", "mlp_up": "up_proj"}


def kappas(model, part, t):
    return [m["sigma"][t][0] / m["sigma"][t][-1] for name, m in model.items() if part in name and m["sigma"][t] is not None]


def test_quartiles_are_numpys(model, model_run):
    found = kappa_by_operator.study(model_run)
    assert found["operator"].values.tolist() == list(OPERATORS)
    assert found["step"].values.tolist() == [10, 20, 30, 40, 50, 60]
    for operator, part in OPERATORS.items():
        for t in range(6):
            expected = np.quantile(kappas(model, part, t), [0.25, 0.5, 0.75])
            one = found.sel(operator=operator).isel(step=t)
            np.testing.assert_allclose([one["lower"], one["median"], one["upper"]], expected, rtol=1e-12)


def test_excess_is_what_shape_leaves(model, model_run):
    found = kappa_by_operator.study(model_run)
    for operator, part in OPERATORS.items():
        null = null_log10_condition(*next(m["shape"] for name, m in model.items() if part in name))
        assert float(found["null"].sel(operator=operator)) == pytest.approx(10**null, rel=1e-12)
        for t in range(6):
            expected = np.median(np.log10(kappas(model, part, t))) - null
            assert float(found["excess"].sel(operator=operator)[t]) == pytest.approx(expected, abs=1e-12)


def test_gaussian_matrices_have_no_excess(build_run):
    rng = np.random.default_rng(3)
    shapes = {"attn.q_proj": (32, 32), "mlp.up_proj": (96, 32)}
    matrices = {
        f"layers.{i}.{operator}.weight": {"shape": shape, "sigma": np.linalg.svd(rng.standard_normal(shape), compute_uv=False)}
        for i in range(40)
        for operator, shape in shapes.items()
    }
    found = kappa_by_operator.study(build_run(matrices, steps=(1,)))
    # log10 κ of a square Gaussian scatters by 0.4 decades, of a 3:1 one by 0.05; a median of 40 by 1.25/√40 of that, and
    # the null's own 64 draws by as much again: three of those together.
    assert abs(float(found["excess"].sel(operator="attn_q")[0])) < 0.35
    assert abs(float(found["excess"].sel(operator="mlp_up")[0])) < 0.045
    # Ranked by κ alone the square operator would be the hard one.
    assert float(found["median"].sel(operator="attn_q")[0]) > 10 * float(found["median"].sel(operator="mlp_up")[0])


def test_missing_records_are_left_out(model, build_run):
    name = "layers.0.attn.q_proj.weight"
    gappy = {**model, name: {**model[name], "sigma": [None, None, *model[name]["sigma"][2:]], "floor": True}}
    never = {"layers.0.attn.o_proj.weight": {"sigma": [None] * 6, "shape": (8, 8)}}
    found = kappa_by_operator.study(build_run({**gappy, **never}, steps=range(6)))
    for t in range(6):
        assert float(found["median"].sel(operator="attn_q")[t]) == pytest.approx(np.median(kappas(gappy, "q_proj", t)), rel=1e-12)
    assert np.isnan(found["median"].sel(operator="attn_o")).all()
    # 4 of the 16 that were recorded, not of 18.
    assert float(found["floor_share"].sel(operator="attn_q")) == 4 / 16
    assert found["floor_share"].sel(operator=["attn_k", "attn_o"]).values.tolist() == [0, 0]


def test_the_summary_names_the_hardest_and_the_easiest(build_run):
    kappa = {"layers.0.attn.q_proj.weight": 50.0, "layers.0.attn.k_proj.weight": 20.0, "layers.0.attn.v_proj.weight": 10.0}
    matrices = {name: {"sigma": (k, 2.0, 1.0), "shape": (3, 3)} for name, k in kappa.items()}
    text = kappa_by_operator.summary(kappa_by_operator.study(build_run(matrices)))
    assert "Hardest operator by median κ: attn_q, 50; easiest: attn_v, 10." in text
    # All shapes are one: there is nothing that shape could correlate with.
    assert "correlates" not in text
    shapes = zip(((3, 3), (3, 9), (3, 30)), matrices.items(), strict=True)
    different = {name: {**matrix, "shape": shape} for shape, (name, matrix) in shapes}
    found = kappa_by_operator.study(build_run(different))
    r = np.corrcoef(np.log10([50, 20, 10]), np.log10(found["null"].values))[0, 1]
    assert f"Shape alone correlates {r:.2f} with that ranking" in kappa_by_operator.summary(found)


def test_error_bars_are_those_of_a_naive_bootstrap(model, model_run, resample):
    found = kappa_by_operator.study(model_run)
    for operator, part in OPERATORS.items():
        own = [m for name, m in model.items() if part in name]  # of layers 0, 1, 2
        null = null_log10_condition(*own[0]["shape"])
        kappa = np.array([np.median([s[0] / s[-1] for s in m["sigma"]]) for m in own])
        excess = np.array([np.median([np.log10(s[0] / s[-1]) for s in m["sigma"]]) for m in own]) - null
        for name, values in (("overall", kappa), ("overall_excess", excess)):
            one = found.sel(operator=operator)
            assert float(one[name]) == pytest.approx(np.median(values), rel=1e-12)
            low, high = resample(lambda chosen, values=values: np.median(values[chosen]), range(3))
            np.testing.assert_allclose([one[f"{name}_low"], one[f"{name}_high"]], [low, high], rtol=1e-12)
            assert low < high
    hardest = max(OPERATORS, key=lambda o: float(found["overall"].sel(operator=o)))
    value, low, high = (float(found[f"overall{end}"].sel(operator=hardest)) for end in ("", "_low", "_high"))
    assert f"Hardest operator by median κ: {hardest}, {value:.3g} (95 % {low:.3g} to {high:.3g}); " in kappa_by_operator.summary(found)
