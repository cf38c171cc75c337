"""Regret of an early allocation: none where nothing changes, and some where the operators trade places."""

import numpy as np
import pytest

from optiscope.analysis import allocation_regret

NAMES = {f"layers.{layer}.{part}.weight": part for layer in range(3) for part in ("attn.q_proj", "mlp.up_proj")}
EASY, HARD = np.geomspace(1, 0.3, 16), np.geomspace(1, 1e-4, 16)


def test_a_run_that_does_not_change_keeps_what_was_gained(build_run):
    matrices = {name: {"sigma": HARD if part == "attn.q_proj" else EASY, "shape": (16, 16)} for name, part in NAMES.items()}
    dataset = allocation_regret.study(build_run(matrices, steps=range(10, 310, 10)), slice(10, 80))
    assert np.ptp(dataset["gain"].values) < 1e-9
    assert dataset["later"].values.sum() > 0
    np.testing.assert_array_equal(dataset["steps"].sel(allocation="first half"), dataset["steps"].sel(allocation="second half"))
    assert (dataset["gain"].values <= dataset["gain_oracle"].values + 1e-9).all()


def test_operators_that_trade_places_are_seen(build_run):
    steps = range(10, 310, 10)
    matrices = {
        name: {"sigma": [HARD if (part == "attn.q_proj") == (step <= 100) else EASY for step in steps], "shape": (16, 16)}
        for name, part in NAMES.items()
    }
    dataset = allocation_regret.study(build_run(matrices, steps=steps), slice(10, 80))
    later, before = dataset["step"].values > 100, dataset["step"].values <= 100
    assert (dataset["gain"].values[later] < dataset["gain"].values[before].min()).all()
    assert dataset["kendall_tau"].values[later] == pytest.approx(-1)
    assert dataset["kendall_tau"].values[before] == pytest.approx(1)
