"""Block structure and preconditioning against matrices whose answer is known."""

import numpy as np
import pytest

from optiscope.diagnostics.quantities.hessian_blocks import (
    diagonal_dominance,
    in_block_null,
    in_block_share,
    preconditioning_effect,
    tile_map,
)


def rotated(eigenvalues, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))
    return q @ np.diag(eigenvalues) @ q.T


def naive_condition(matrix):
    """From the eigenvalues of a matrix that need not be symmetric."""
    size = np.abs(np.linalg.eigvals(matrix))
    return size.max() / size.min()


@pytest.mark.parametrize("signs", [1, -1])
def test_the_ratio_is_that_of_the_eigenvalues_of_the_product(signs):
    rng = np.random.default_rng(1)
    eigenvalues = np.geomspace(1, 500, 30)
    eigenvalues[:10] *= signs  # indefinite, as Hessians of networks are
    h, x = rotated(eigenvalues), rng.standard_normal(30)
    r, kappa = preconditioning_effect(h, x)
    assert kappa == pytest.approx(500, rel=1e-9)
    assert r == pytest.approx(naive_condition(np.diag(1 / np.abs(h @ x)) @ h) / 500, rel=1e-8)


def test_a_diagonal_hessian_is_made_perfect_by_signs():
    h = np.diag(np.geomspace(1, 500, 50))
    x = np.random.default_rng(2).choice([-1.0, 1.0], 50)
    r, kappa = preconditioning_effect(h, x)
    assert (r, kappa) == (pytest.approx(1 / 500, rel=1e-12), pytest.approx(500, rel=1e-12))


def test_the_medians_of_the_reference():
    """d = 50, κ = 500, Gaussian x: r = 0.26 on a diagonal H, whatever its spectrum, and about 10 on a dense one (τ = 0.1)."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4001, 50))
    # On a diagonal H, κ(D·H) = max|x|/min|x|.
    expected = np.median(np.abs(x).max(axis=1) / np.abs(x).min(axis=1)) / 500
    r, _ = preconditioning_effect(np.diag(np.geomspace(1, 500, 50)), x)
    assert r == pytest.approx(expected, rel=1e-9)
    assert r == pytest.approx(0.26, rel=0.15)  # the value of a simulation of unknown size; 4001 points give 0.286
    dense = [rotated(np.geomspace(1, 500, 50), seed) for seed in range(40)]
    ratios = [preconditioning_effect(h, x[i])[0] for i, h in enumerate(dense)]
    assert np.median([diagonal_dominance(h) for h in dense]) < 0.15
    assert np.median(ratios) > 3


def test_a_condition_number_beyond_the_format_is_missing():
    h = rotated(np.geomspace(1e-9, 1, 20))
    assert preconditioning_effect(h, np.ones(20))[1] == pytest.approx(1e9, rel=1e-4)
    assert np.isnan(preconditioning_effect(h, np.ones(20), roundoff=2.0**-24)).all()
    # What is not symmetric tells its own noise.
    noisy = rotated(np.geomspace(1e-3, 1, 20)) + 1e-3 * np.random.default_rng(4).standard_normal((20, 20))
    assert np.isnan(preconditioning_effect(noisy, np.ones(20))).all()
    for broken in (np.zeros((3, 3)), np.full((3, 3), np.nan)):
        assert np.isnan(preconditioning_effect(broken, np.ones(3))).all()
    assert np.isnan(diagonal_dominance(np.zeros((3, 3))))


def test_block_probes_give_the_share_of_a_known_matrix():
    rng, size, blocks = np.random.default_rng(5), 24, np.repeat(np.arange(6), 4)
    h = rng.standard_normal((size, size)) + 10 * np.kron(np.eye(6), np.ones((4, 4)))
    h = h + h.T
    exact = sum(np.sum(h[np.ix_(blocks == b, blocks == b)] ** 2) for b in range(6)) / np.sum(h**2)
    inside, column = [], []
    for b in rng.integers(6, size=2000):
        u = np.where(blocks == b, rng.choice([-1.0, 1.0], size), 0)
        inside.append(np.sum((h @ u)[blocks == b] ** 2))
        column.append(np.sum((h @ u) ** 2))
    share, error = in_block_share(inside, column)
    assert abs(share - exact) < 3 * error
    assert error < 0.01
    # With an empty part the share is of nothing.
    assert np.isnan(in_block_share([], [])).all()
    assert np.isnan(in_block_share([0.0], [0.0])[0])
    assert np.isnan(in_block_share([1.0], [2.0])[1])


def test_the_null_is_the_share_of_a_matrix_of_ones():
    blocks = np.array([0, 0, 0, 1, 2, 2])
    same = blocks[:, None] == blocks
    assert in_block_null(blocks) == pytest.approx(same.mean())


def test_a_map_is_of_means_over_tiles():
    h = np.random.default_rng(6).standard_normal((40, 40))
    found = tile_map(h).reshape(16, 16)
    edges = [i * 40 // 16 for i in range(17)]
    for i, j in ((0, 0), (3, 11), (15, 15)):
        assert found[i, j] == pytest.approx(np.log10(np.abs(h[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]).mean()))
    assert np.isnan(tile_map(np.ones((3, 3)))[9:]).all()
