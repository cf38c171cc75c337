"""Intervals of a gain against scipy's bootstrap, and against a loop over draws of layers."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from optiscope.diagnostics.bootstrap import RESAMPLES, multiplicities, resamples
from optiscope.diagnostics.schedules.evidence import gain_intervals

RNG = np.random.default_rng(2)


def ends(found):
    return found.confidence_interval.low, found.confidence_interval.high


@pytest.mark.parametrize("largest", [False, True])
def test_two_operators_in_every_layer_are_scipys_bootstrap(largest):
    """A toy: one record, 10 layers that each hold both operators; what is drawn are layers."""
    layers, members = np.tile(np.arange(10), 2), {"attn_q": np.arange(20) < 10, "mlp_up": np.arange(20) >= 10}
    before, after = RNG.uniform(0.3, 0.6, 20), RNG.uniform(0.2, 0.6, 20)
    weight = (0.25, 0.75)

    def objective(values, drawn):
        means = [values[:10][drawn].mean(), values[10:][drawn].mean()]
        return max(means) if largest else np.dot(weight, means)

    def expected(statistic):
        return ends(
            bootstrap(
                (np.arange(10),), lambda drawn: statistic(drawn.astype(int)), n_resamples=RESAMPLES, method="percentile", vectorized=False,
                rng=np.random.default_rng(0),
            )
        )  # fmt: skip

    found = gain_intervals(before[None], after[None], members, weight, layers, largest=largest)
    # The same draws, summed in another order.
    np.testing.assert_allclose(found.gain, expected(lambda d: objective(before, d) - objective(after, d)), rtol=1e-10)
    np.testing.assert_allclose(found.relative, expected(lambda d: 1 - objective(after, d) / objective(before, d)), rtol=1e-10)
    np.testing.assert_allclose(found.baseline["mlp_up"], expected(lambda d: before[10:][d].mean()), rtol=1e-10)


def test_gaps_layers_of_different_size_and_matrices_without_one_as_a_loop():
    operator = np.array(["a", "a", "b", "b", "b", "c", "a"])
    layers = np.array([0, 1, 0, 1, 2, -1, 1])
    members, weight = {o: operator == o for o in "abc"}, {"a": 0.5, "b": 0.3, "c": 0.2}
    before, after = RNG.uniform(0.3, 0.6, (2, 3, 7))
    before[1, 2] = after[0, 3] = after[1, 3] = np.nan
    drawn = np.random.default_rng(0).integers(4, size=(RESAMPLES, 4))
    order = [[5], [0, 2], [1, 3, 6], [4]]  # −1 comes first
    gains, of_a = [], []
    for row in drawn:
        total, j = 0.0, np.zeros(2)
        for o, w in weight.items():
            pairs = [
                (before[t, m], after[t, m])
                for layer in row for m in order[layer] for t in range(3)
                if operator[m] == o and np.isfinite(before[t, m] + after[t, m])
            ]  # fmt: skip
            if pairs:
                total += w
                j += w * np.mean(pairs, axis=0)
                of_a += [np.mean(pairs, axis=0)[0]] if o == "a" else []
        if total:
            gains.append((j[0] - j[1]) / total)
    found = gain_intervals(before, after, members, list(weight.values()), layers)
    np.testing.assert_allclose(found.gain, np.quantile(gains, [0.025, 0.975]), rtol=1e-10)
    # Of two layers (a) and of one matrix (c) there is no interval; b is in three.
    assert found.baseline["a"] is None
    assert found.baseline["c"] is None
    assert found.baseline["b"] is not None


@pytest.mark.parametrize("layers", [[0, 0, 0], [0, 0, 1]])
def test_under_three_layers_there_is_none(layers):
    found = gain_intervals(np.ones((1, 3)), np.zeros((1, 3)), {"a": np.ones(3, bool)}, [1.0], np.array(layers))
    assert (found.gain, found.relative, found.baseline) == (None, None, {"a": None})


def test_the_share_of_an_interval_that_holds_the_truth():
    """A gain of exactly zero in 30 layers that differ: the interval must hold it in about 95 of 100 data sets."""
    rng, hits = np.random.default_rng(3), 0
    layers, members = np.tile(np.arange(30), 2), {"a": np.arange(60) < 30, "b": np.arange(60) >= 30}
    for _ in range(300):
        before = 0.5 + 0.05 * rng.standard_normal((1, 60))
        low, high = gain_intervals(before, before + 0.05 * rng.standard_normal((1, 60)), members, [0.5, 0.5], layers).gain
        hits += low <= 0 <= high
    # 95 % nominal, about 93 % for 30 layers; binomial standard deviation 1.5 %.
    assert 0.88 < hits / 300 < 0.98


@pytest.mark.parametrize("layers", [[0, 0, 1, 2, 2, 2], [-1, 3, -1, 0], [0, 1]])
def test_multiplicities_count_the_resamples(layers):
    counts = multiplicities(layers)
    assert counts.tolist() == [[int((row == m).sum()) for m in range(len(layers))] for row in resamples(layers)]
