"""Exact polar factors against an SVD, and torch's function back in its place."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import _muon as torch_muon

from optiscope.examples.experiments.exact_polar import exact_polar, polar_factor


def built(shape, condition, seed):
    """A matrix of known polar factor: singular values spread evenly in the logarithm from 1 to 1/condition."""
    rng = np.random.default_rng(seed)
    rank = min(shape)
    u, _ = np.linalg.qr(rng.standard_normal((shape[0], rank)))
    v, _ = np.linalg.qr(rng.standard_normal((shape[1], rank)))
    return u * condition ** (-np.arange(rank) / (rank - 1)) @ v.T, u @ v.T


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)], ids=str)
# The Gram matrix squares κ. Seen: 3e-16·κ² at the most.
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_it_is_the_polar_factor(shape, condition):
    matrix, factor = built(shape, condition, 0)
    found = polar_factor(torch.from_numpy(matrix)).numpy()
    np.testing.assert_allclose(found, factor, atol=2e-15 * condition**2 + 1e-14)


def test_it_is_the_svds_of_a_float32_matrix():
    matrix = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    u, _, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    found = polar_factor(matrix)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), u @ vt, atol=6e-8)  # float32's roundoff of numbers below 1


def test_a_zero_matrix_stays_zero():
    assert torch.equal(polar_factor(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_muon_takes_it_inside_the_context_alone():
    before = torch_muon._zeropower_via_newtonschulz
    start, gradient = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1))
    with exact_polar():
        weight = nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        torch.optim.Muon([weight], lr=0.5, weight_decay=0.0).step()
    # The first momentum is a multiple of the gradient.
    u, _, vt = np.linalg.svd(gradient.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(weight.detach().numpy(), start.numpy() - 0.5 * u @ vt, atol=5e-7)  # seen: 2e-7, of float32 weights
    assert torch_muon._zeropower_via_newtonschulz is before
    with pytest.raises(RuntimeError, match="inside"), exact_polar():
        raise RuntimeError("inside")
    assert torch_muon._zeropower_via_newtonschulz is before
