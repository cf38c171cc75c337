"""Maps against means over tiles, taken one by one."""

from itertools import pairwise

import numpy as np
import pytest

from optiscope.diagnostics.catalogue import MAP_SIDE
from optiscope.diagnostics.quantities.factored import sums
from optiscope.diagnostics.quantities.matrix_map import edges, log_map, rank1_log_map


def naive(v):
    rows, cols = edges(v.shape[0]), edges(v.shape[1])
    tiles = [v[a:b, c:d] for a, b in pairwise(rows) for c, d in pairwise(cols)]
    means = [np.log10(tile[tile > 0]).mean() if (tile > 0).any() else np.nan for tile in tiles]
    return np.array(means + [np.nan] * (MAP_SIDE**2 - len(means)))


@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(64, 48), (5, 7), (1, 100), (333, 17), (16, 16), (2000, 70)])
def test_tiles_one_by_one(shape, zeros):
    generator = np.random.default_rng(0)
    v = np.exp(3 * generator.standard_normal(shape) - 20)
    v[generator.random(shape) < zeros] = 0
    np.testing.assert_allclose(log_map(v), naive(v), rtol=1e-12)
    assert np.isfinite(log_map(v)).sum() <= min(16, shape[0]) * min(16, shape[1])


@pytest.mark.parametrize("shape", [(64, 48), (5, 7), (1, 100), (333, 17)])
def test_the_map_of_the_rank_one_form_is_that_of_the_form_multiplied_out(shape):
    v = np.exp(np.random.default_rng(1).standard_normal(shape))
    rows, columns = sums(v)
    np.testing.assert_allclose(rank1_log_map(rows, columns), naive(np.outer(rows, columns) / v.sum()), rtol=1e-11, atol=1e-12)


def test_rows_without_any_are_left_out():
    v = np.outer([1.0, 0.0, 10.0, 10.0], np.ones(3))
    assert np.isnan(log_map(v)[3:6]).all()
    assert log_map(v)[6:12] == pytest.approx(np.ones(6))
    assert rank1_log_map(*sums(v))[:12] == pytest.approx([0] * 3 + [np.nan] * 3 + [1] * 6, nan_ok=True)
    assert np.isnan(rank1_log_map(np.zeros(4), np.zeros(3))).all()


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
def test_tiles_share_an_axis_evenly(length):
    sizes = np.diff(edges(length))
    assert len(sizes) == min(16, length)
    assert sizes.sum() == length
    assert sizes.max() - sizes.min() <= 1
