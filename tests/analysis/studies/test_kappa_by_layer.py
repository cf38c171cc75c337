"""The depth profile against NumPy."""

import numpy as np
import pytest

from optiscope.analysis import kappa_by_layer


def test_quartiles_per_layer_at_four_steps(model, model_run):
    found = kappa_by_layer.study(model_run)
    assert found["layer"].values.tolist() == [0, 1, 2]
    # Of six records the first, the last, and two evenly between.
    assert found["step"].values.tolist() == [10, 30, 40, 60]
    for t, record in enumerate((0, 2, 3, 5)):
        for layer in range(3):
            kappas = [m["sigma"][record][0] / m["sigma"][record][-1] for name, m in model.items() if f"layers.{layer}." in name]
            one = found.isel(step=t).sel(layer=layer)
            np.testing.assert_allclose([one["lower"], one["median"], one["upper"]], np.quantile(kappas, [0.25, 0.5, 0.75]), rtol=1e-12)


def test_matrices_outside_the_layers_are_left_out(build_run):
    matrices = {"layers.0.attn.q_proj.weight": {"sigma": (4.0, 1.0)}, "lm_head.weight": {"sigma": (9.0, 1.0)}}
    found = kappa_by_layer.study(build_run(matrices))
    assert found["layer"].values.tolist() == [0]
    assert np.all(found["median"] == 4)


def test_steps_without_a_spectrum_are_not_chosen(build_run):
    sigma = [(4.0, 1.0), None, (9.0, 1.0), None]
    found = kappa_by_layer.study(build_run({"layers.0.attn.q_proj.weight": {"sigma": sigma}}, steps=(1, 2, 3, 4)))
    assert found["step"].values.tolist() == [1, 3]
    assert kappa_by_layer.summary(found).startswith("At step 3 median κ is largest in layer 0 (9)")


def test_layers_of_one_record_need_not_be_those_of_another(build_run):
    matrices = {
        "layers.0.attn.q_proj.weight": {"sigma": [(4.0, 1.0), (5.0, 1.0)]},
        "layers.1.attn.q_proj.weight": {"sigma": [(7.0, 1.0), None]},
    }
    found = kappa_by_layer.study(build_run(matrices, steps=(1, 2)))
    np.testing.assert_array_equal(found["median"], [[4, 7], [5, np.nan]])
    assert "largest in layer 0 (5) and smallest in layer 0 (5)" in kappa_by_layer.summary(found)


@pytest.mark.parametrize("name", ["q_proj.weight", "lm_head.weight"])
def test_without_layers_it_says_so(build_run, name):
    with pytest.raises(ValueError, match="no matrix with a spectrum holds a layer index in its name"):
        kappa_by_layer.study(build_run({name: {"sigma": (4.0, 1.0)}}))


def depth_run(build_run, kappas):
    return build_run({f"layers.{layer}.attn.q_proj.weight": {"sigma": (kappa, 1.0)} for layer, kappa in kappas.items()}, steps=(1,))


def test_the_trend_is_a_straight_line_through_the_layers(build_run, resample):
    layers = np.array([0, 1, 2, 4, 7, 9])  # some layers have no such matrix
    log_kappa = 1 + 0.1 * layers + np.array([0.3, -0.2, 0.1, 0.4, -0.3, 0.2])
    found = kappa_by_layer.study(depth_run(build_run, dict(zip(layers.tolist(), 10**log_kappa, strict=True))))
    assert float(found["trend"][0]) == pytest.approx(9 * np.polyfit(layers, log_kappa, 1)[0], rel=1e-10)

    def rise(chosen):
        return 9 * np.cov(layers[chosen], log_kappa[chosen])[0, 1] / np.var(layers[chosen], ddof=1)

    # No draw of this seed is of a single layer, which has no slope.
    np.testing.assert_allclose([found["trend_low"][0], found["trend_high"][0]], resample(rise, range(6)), rtol=1e-9)


@pytest.mark.parametrize(("slope", "chance"), [(0.2, False), (0.0, True)])
def test_the_summary_tells_a_trend_from_chance(build_run, slope, chance):
    scatter = np.tile([0.3, -0.3], 6)
    found = kappa_by_layer.study(depth_run(build_run, {i: 10 ** (1 + slope * i + s) for i, s in enumerate(scatter)}))
    assert kappa_by_layer.summary(found).endswith(", which may be chance." if chance else ").")


def test_one_layer_has_no_trend(build_run):
    found = kappa_by_layer.study(depth_run(build_run, {3: 10.0}))
    assert np.isnan([found[name] for name in ("trend", "trend_low", "trend_high")]).all()
    two = kappa_by_layer.study(depth_run(build_run, {0: 10.0, 1: 100.0}))
    assert float(two["trend"][0]) == pytest.approx(1)
    assert np.isnan(two["trend_low"]).all()
    assert kappa_by_layer.summary(two).endswith("it changes, in decades, by +1.00.")
