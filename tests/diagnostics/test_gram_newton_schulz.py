"""The Gram form against the standard iteration by SVD, its precision, and its FLOPs as published.

Gram Newton–Schulz: the iteration carried by the r×r Gram matrix alone, cheaper than the standard one where a matrix is far from square.

R = XXᵀ, Q = I; per step Z = bR + cR², Q ← QZ + aQ, R ← Z(RZ + aR) + a(RZ + aR); the output is QX. In exact arithmetic it is the
standard iteration. In low precision R loses the small singular values, whose squares it holds, so that a restart (X ← QX, R ← XXᵀ, Q ← I)
is needed on the way. Source: Zhang, Amsel, Chen, Dao, "Gram Newton–Schulz" (2026); theirs restarts once, before the third step, in float16.
"""

from collections.abc import Callable, Collection
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from optiscope.diagnostics.newton_schulz.families import FAMILIES, Coefficients
from optiscope.diagnostics.newton_schulz.matrix_iteration import iterates
from optiscope.diagnostics.newton_schulz.spectral_map import ns_flops

Matrix: TypeAlias = NDArray[Any]


def gram_newton_schulz(
    start: Matrix, coefficients: Coefficients, restarts: Collection[int] = (), rounded: Callable[[Matrix], Matrix] = lambda x: x
) -> Matrix:
    """O from X₀ = `start`, shape (m, n), in its own precision (float32 or float64).

    Args:
        start: X₀, of norm about 1 (:func:`.matrix_iteration.start_of`).
        coefficients: (a, b, c) of every step.
        restarts: steps, counted from 0, before which X, R and Q are made anew.
        rounded: applied to what every product gives, :func:`.matrix_iteration.to_bfloat16` for example.
    """
    x = rounded(start if start.shape[0] <= start.shape[1] else start.T)
    q, r = np.eye(len(x), dtype=x.dtype), rounded(x @ x.T)
    for step, (a, b, c) in enumerate(coefficients):
        if step in restarts:
            x = rounded(q @ x)
            q, r = np.eye(len(x), dtype=x.dtype), rounded(x @ x.T)
        z = rounded(b * r + c * (r @ r))
        q = rounded(q @ z + a * q)
        half = rounded(r @ z + a * r)
        r = rounded(z @ half + a * half)
    output = rounded(q @ x)
    return output if start.shape[0] <= start.shape[1] else output.T


def gram_flops(rows: int, cols: int, steps: int, restarts: int = 1) -> int:
    """FLOPs of `steps` steps, r and q being the short and long side: 4r²q(restarts + 1) for X and R = XXᵀ, and 2r³ for each product of r×r.

    R² takes one product in every step, Q one but after a start, where it is I, and R two but before a restart and at the end, where it is
    not needed. At r = q and five steps this is 1.2 times the standard iteration, which they keep there; at q = 3r it is 0.74.
    """
    r, q = min(rows, cols), max(rows, cols)
    starts = restarts + 1
    squares = steps + (steps - starts) + 2 * (steps - starts)
    return 2 * (2 * starts * r * r * q + squares * r**3)


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
