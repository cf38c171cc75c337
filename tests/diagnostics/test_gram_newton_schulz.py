"""The Gram form against the standard iteration by SVD, its precision, and its FLOPs as published."""

from itertools import combinations

import numpy as np
import pytest

from optiscope.diagnostics.gram_newton_schulz import gram_flops, gram_newton_schulz
from optiscope.diagnostics.matrix_iteration import iterates
from optiscope.diagnostics.newton_schulz import ns_flops
from optiscope.diagnostics.ns_families import FAMILIES

NAMES = [name for name, family in FAMILIES.items() if family.scaling == "frobenius"]


def by_svd(x, coefficients):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_in_float64_it_is_newton_schulz_with_any_restarts(name, shape):
    m = np.random.default_rng(0).standard_normal(shape)
    x, coefficients = m / np.linalg.norm(m), FAMILIES[name].schedule(FAMILIES[name].steps)
    expected = by_svd(x, coefficients)
    for count in range(5):
        for restarts in combinations(range(1, 5), count):
            # Measured: 1.0e-13 at most, over all families and restarts; the standard iteration is 9e-14 from the SVD.
            np.testing.assert_allclose(gram_newton_schulz(x, coefficients, restarts), expected, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_standard_iteration_in_float64_is_that_of_the_singular_values(name):
    m = np.random.default_rng(1).standard_normal((12, 30))
    x, coefficients = m / np.linalg.norm(m), FAMILIES[name].schedule(FAMILIES[name].steps)
    *_, (output, _) = iterates(x, coefficients)
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, by_svd(x, coefficients), atol=1e-12)


def half(x):
    return x.astype(np.float16).astype(np.float32)


def test_in_float16_it_needs_a_restart():
    random = np.random.default_rng(0)
    u = np.linalg.qr(random.standard_normal((64, 64)))[0]
    v = np.linalg.qr(random.standard_normal((192, 64)))[0]
    m = (u * np.logspace(0, -4, 64)) @ v.T
    x = (m / np.linalg.norm(m)).astype(np.float32)
    coefficients = FAMILIES["polar_express_gram"].coefficients
    expected = by_svd(x.astype(np.float64), coefficients)
    error = {
        restarts: np.linalg.norm(gram_newton_schulz(x, coefficients, restarts, half) - expected) / 8 for restarts in ((), (2,), (1, 3))
    }
    # Measured per √r: 0.97, 0.036, 0.016. In float64: 2e-12, 2e-13, 3e-14.
    assert error[()] > 5 * error[(2,)] > 5 * error[(1, 3)]


@pytest.mark.parametrize(("ratio", "share"), [(1, 1.20), (2, 0.88), (3, 0.74), (5, 0.62)])
def test_flops_are_the_published_share_of_the_standard_iteration(ratio, share):
    assert gram_flops(256, 256 * ratio, 5) / (5 * ns_flops(256, 256 * ratio)) == pytest.approx(share, abs=5e-3)
    assert gram_flops(256, 256 * ratio, 5) == gram_flops(256 * ratio, 256, 5)
