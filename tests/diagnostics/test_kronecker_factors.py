"""Kronecker factors with chosen eigenvalues and bases, and what ties Shampoo, SOAP and Adafactor together."""

import numpy as np
import pytest

from optiscope.diagnostics.quantities.factored import rank1, sums
from optiscope.diagnostics.quantities.kronecker_factors import condition_and_rank, off_diagonal


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n))).Q


def built(eigenvalues, seed=0):
    q = orthogonal(len(eigenvalues), seed)
    return (q * eigenvalues) @ q.T, q


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_chosen_eigenvalues(condition):
    eigenvalues = np.geomspace(1, 1 / condition, 20)
    factor, _ = built(eigenvalues)
    kappa, rank = condition_and_rank(factor)
    assert kappa == pytest.approx(condition, rel=1e-6)  # eigvalsh is right to 1e-15·λ_max
    assert rank == pytest.approx(eigenvalues.sum(), rel=1e-12)


def test_the_smallest_eigenvalue_is_held_at_a_trillionth():
    assert condition_and_rank(np.diag([1.0, 1e-20, -1e-9])) == pytest.approx((1e12, 1.0), rel=1e-6)


@pytest.mark.parametrize("factor", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.array([[np.inf]])])
def test_nothing_is_said_of_zero_or_what_is_not_finite(factor):
    assert np.isnan(condition_and_rank(factor)).all()
    assert np.isnan(off_diagonal(np.nan_to_num(factor, posinf=np.nan) * np.nan, np.eye(len(factor))))


def test_energy_off_the_diagonal_is_none_in_the_eigenbasis_and_known_beside_it():
    factor, q = built(np.array([3.0, 1.0]))
    assert off_diagonal(factor, q) < 1e-30
    # Turned by α: off the diagonal stands (λ_1 − λ_2)·sin α cos α, twice; the norm stays √10.
    for alpha in (0.1, np.pi / 4):
        turn = np.array([[np.cos(alpha), -np.sin(alpha)], [np.sin(alpha), np.cos(alpha)]])
        assert off_diagonal(factor, q @ turn) == pytest.approx(2 * (2 * np.sin(alpha) * np.cos(alpha)) ** 2 / 10, rel=1e-12)


def test_shampoo_in_its_eigenbasis_is_adafactor():
    """With L and R the full expectations, row sums of E[G'²] are the eigenvalues of L, column sums those of R."""
    gradients = np.random.default_rng(7).standard_normal((30, 5, 4)) * np.linspace(1, 3, 4)
    left, right = np.mean(gradients @ gradients.mT, 0), np.mean(gradients.mT @ gradients, 0)
    (of_rows, q_left), (of_columns, q_right) = np.linalg.eigh(left), np.linalg.eigh(right)
    rows, columns = sums(np.mean((q_left.T @ gradients @ q_right) ** 2, 0))
    np.testing.assert_allclose(rows, of_rows, rtol=1e-12)
    np.testing.assert_allclose(columns, of_columns, rtol=1e-12)
    # So dividing by the square root of the rank-1 form is L^{−1/2}GR^{−1/2}·√tr L.
    g = gradients[0]
    adafactor = q_left @ (q_left.T @ g @ q_right / np.sqrt(np.outer(rows, columns) / rows.sum())) @ q_right.T
    half = [(q * values**-0.5) @ q.T for values, q in ((of_rows, q_left), (of_columns, q_right))]
    np.testing.assert_allclose(adafactor, half[0] @ g @ half[1] * np.sqrt(np.trace(left)), atol=1e-12 * np.abs(adafactor).max())


def test_the_kronecker_identity_needs_vectors_row_by_row():
    """(L ⊗ R)⁻¹vec(G) = vec(L⁻¹GR⁻¹) with rows one behind the other; column by column the factors change places."""
    left, right, g = built(np.array([1.0, 2, 3]))[0], built(np.array([1.0, 5]), 1)[0], np.random.default_rng(2).standard_normal((3, 2))
    applied = np.linalg.solve(left, np.linalg.solve(right, g.T).T)
    np.testing.assert_allclose(np.linalg.solve(np.kron(left, right), g.ravel()), applied.ravel(), rtol=1e-12)
    np.testing.assert_allclose(np.linalg.solve(np.kron(right, left), g.ravel("F")), applied.ravel("F"), rtol=1e-12)


def test_gradients_that_are_kronecker_have_a_rank_one_second_moment_in_the_eigenbasis():
    """E[G'²] of A·Z·B with white Z is λ_L λ_Rᵀ: the information that SOAP's v adds to Shampoo's factors is none but for sampling."""
    generator, samples = np.random.default_rng(3), 4000
    a, b = generator.standard_normal((4, 4)), generator.standard_normal((3, 3))
    gradients = a @ generator.standard_normal((samples, 4, 3)) @ b
    q_left, q_right = np.linalg.eigh(a @ a.T)[1], np.linalg.eigh(b.T @ b)[1]
    information = rank1(np.mean((q_left.T @ gradients @ q_right) ** 2, 0)).information
    # 2·samples·MI is about Σ p δ² of means whose δ has variance 2, p the shares of the 12 elements: 6/12 of that for equal shares, less for
    # unequal ones. Over 400 seeds, factors drawn anew: mean 0.34, at most 1.7.
    assert information < 4 / (2 * samples)
    # Of two such kinds of gradients, one to the other as the axes are turned round, no factors tell.
    mixed = np.concatenate([gradients, gradients[:, ::-1, ::-1]])
    assert rank1(np.mean((q_left.T @ mixed @ q_right) ** 2, 0)).information > 10 * information
