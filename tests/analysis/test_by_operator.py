"""Medians per operator and their error bars, against NumPy and against what is known of the interval of a median."""

import numpy as np
import pytest
import xarray as xr

from optiscope.analysis.by_operator import by_operator, medians_by
from optiscope.diagnostics.bootstrap import layer_interval


def matrices(values, operators, layers, steps=None):
    values = np.asarray(values, float)
    coords = {"operator": ("matrix", np.array(operators)), "layer": ("matrix", layers), "step": steps or range(len(values))}
    return xr.DataArray(values, dims=("step", "matrix"), coords=coords)


def test_over_training_quartiles_of_the_operators_matrices():
    values = np.random.default_rng(0).standard_normal((4, 7))
    values[1, 2] = np.nan
    values[2, :4] = np.nan
    found = by_operator({"drift": matrices(values, ["attn_q"] * 4 + ["mlp_up"] * 3, [0, 1, 2, 3, 0, 1, 2])})
    assert found["operator"].values.tolist() == ["attn_q", "mlp_up"]
    for t in (0, 1, 3):
        for name, q in (("drift_lower", 0.25), ("drift", 0.5), ("drift_upper", 0.75)):
            for operator, own in (("attn_q", values[t, :4]), ("mlp_up", values[t, 4:])):
                expected = np.quantile(own[np.isfinite(own)], q)
                assert float(found[name].sel(operator=operator)[t]) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found["drift"][2, 0])


def test_a_matrix_counts_once_with_its_median_over_the_records():
    # One matrix has five records, one a single record: medians 3 and 10, not the median 4 of all six.
    values = [[1, np.nan], [2, np.nan], [3, 10], [4, np.nan], [5, np.inf]]
    low, median, high = medians_by(matrices(values, ["a", "a"], [0, 1]), ["a", "a"], ["a", "none"])
    np.testing.assert_array_equal(median, [6.5, np.nan])
    # Two layers say nothing about other layers.
    assert np.isnan([low, high]).all()


def test_ends_are_those_of_the_layer_bootstrap():
    values, layers = np.random.default_rng(1).standard_normal((3, 10)), np.arange(10) // 2
    low, median, high = medians_by(matrices(values, ["a"] * 10, layers), ["a"] * 10, ["a"])
    own = np.median(values, axis=0)
    assert (low[0], high[0]) == layer_interval(lambda drawn: float(np.median(own[drawn])), layers)
    assert low[0] < median[0] < high[0]
    # Layers of different size, and matrices without one, which are clusters of their own.
    layers = np.array([0, 0, 0, 1, 2, 2, 3, 3, -1, -1])
    low, _, high = medians_by(matrices(values, ["a"] * 10, layers), ["a"] * 10, ["a"])
    assert (low[0], high[0]) == layer_interval(lambda drawn: float(np.median(own[drawn])), layers)


def test_medians_by_counts_a_matrix_once():
    label, layers = np.array(["a"] * 5 + ["b"] * 5), np.tile(np.arange(5), 2)
    data = np.random.default_rng(1).standard_normal((7, 10))
    data[:6, 0] = np.nan
    found = medians_by(xr.DataArray(data, dims=("step", "matrix"), coords={"layer": ("matrix", layers)}), label, ["b", "a", "c"])
    per_matrix = np.nanmedian(data, axis=0)
    for i, own in ((0, label == "b"), (1, label == "a")):
        assert found[1, i] == np.median(per_matrix[own])
        expected = layer_interval(lambda j, own=own: float(np.median(per_matrix[own][j])), layers[own])
        np.testing.assert_allclose(found[[0, 2], i], expected, rtol=1e-12)
    assert np.isnan(found[:, 2]).all()


def test_medians_are_in_the_order_asked_for():
    from optiscope.analysis.run import median_by

    values = xr.DataArray(np.arange(100.0)[None], dims=("step", "matrix"))
    labels = [f"o{i}" for i in range(100)]
    np.testing.assert_array_equal(median_by(values, labels, labels[::-1]), values.values[:, ::-1])
