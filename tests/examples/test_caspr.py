"""CASPR: its formula in float64 NumPy, and the Kronecker-sum it comes from."""

import numpy as np
import pytest
import torch
from contract.transcriptions_examples import caspr, power
from torch import nn

from optiscope.examples.optimizers.caspr import CASPR, precondition


def matrix(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3)], ids=str)
def test_steps_are_those_of_the_formula(shape):
    w = nn.Parameter(matrix(*shape))
    optimizer = CASPR([w], lr=0.1, weight_decay=0.5)
    reference = caspr(shape)
    for seed in range(1, 7):
        w.grad = matrix(*shape, seed=seed)
        before = w.detach().numpy().copy()
        kept = reference(w.grad.numpy(), before)
        optimizer.step()
        np.testing.assert_allclose(optimizer.state[w]["exp_avg"], kept.momentum, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(w.detach(), before * (1 - 0.1 * 0.5) - 0.1 * kept.update, atol=1e-10)  # seen: 1e-12


def test_preconditioner_is_the_square_of_the_mean_of_both_axes():
    """((A ⊗ I + I ⊗ B)/2)² vec(G), A = L^(−1/4), B = R^(−1/4), on row-major vec, as one 12×12 matrix."""
    g, left, right = matrix(3, 4), matrix(3, 5, 1), matrix(4, 6, 2)
    left, right = left @ left.mT, right @ right.mT
    a, b = power(left.numpy() + 1e-3 * np.eye(3), -0.25), power(right.numpy() + 1e-3 * np.eye(4), -0.25)
    axes = (np.kron(a, np.eye(4)) + np.kron(np.eye(3), b)) / 2
    wanted = (axes @ axes @ g.numpy().reshape(-1)).reshape(3, 4)
    np.testing.assert_allclose(precondition(g, left, right, 1e-3), wanted, rtol=1e-11)
    # Shampoo's own, L^(−1/4) G R^(−1/4), is something else.
    assert np.abs(a @ g.numpy() @ b - wanted).max() > 0.01


def test_first_step_is_the_polar_factor():
    """With L = GGᵀ and R = GᵀG each of L^(−1/2)G, L^(−1/4)GR^(−1/4) and GR^(−1/2) is UVᵀ."""
    g = matrix(6, 6)
    u, _, vt = torch.linalg.svd(g)
    w = nn.Parameter(torch.zeros_like(g))
    optimizer = CASPR([w], lr=1.0, eps=1e-14)
    w.grad = g
    optimizer.step()
    # ε shifts σ² by 1e-14, and the smallest σ² here is 0.12. Seen: 4e-14.
    assert torch.dist(-w.detach(), u @ vt) < 1e-10


def test_size_of_the_gradient_does_not_matter():
    """Gradients c times as large, and ε c² times, which stands beside squares of them."""
    steps = []
    for scale in (1.0, 1e3):
        w = nn.Parameter(matrix(4, 6))
        optimizer = CASPR([w], lr=0.1, eps=1e-8 * scale**2)
        for seed in range(1, 4):
            w.grad = scale * matrix(4, 6, seed)
            optimizer.step()
        steps.append(w.detach().clone())
    assert torch.dist(steps[0], matrix(4, 6)) > 0.1
    assert torch.dist(*steps) < 1e-10


def test_what_it_cannot_take_is_refused():
    with pytest.raises(ValueError, match=r"params: CASPR preconditions matrices, got a parameter of shape \(3,\)"):
        CASPR([nn.Parameter(torch.ones(3))])
