"""The shared iteration: against the SVD, against torch's to the bit, and that it leaves its input alone; who takes only matrices."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz as of_torch

from optiscope.examples.optimizers.adamuon import AdaMuon
from optiscope.examples.optimizers.amo_muon import AMOMuon
from optiscope.examples.optimizers.mars_m import MARSM
from optiscope.examples.optimizers.newton_schulz import JORDAN, orthogonalise
from optiscope.examples.optimizers.root import ROOT
from optiscope.examples.optimizers.teon import TEON
from optiscope.examples.optimizers.turbo_muon import TurboMuon

SHAPES = [(5, 5), (4, 9), (9, 4), (1, 6), (6, 1)]
MIXED = [(4.0848, -6.8946, 2.9270), (2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [0, 2, 5])
def test_it_maps_the_singular_values(shape, steps, gaussian, through_svd):
    matrix = gaussian(shape, 0)
    triples = (MIXED + MIXED[-1:] * 2)[:steps]
    found = orthogonalise(matrix, MIXED, steps, dtype=torch.float64)
    assert found.shape == shape
    np.testing.assert_allclose(found, through_svd(matrix, triples), atol=1e-14)  # seen: 2e-15


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_one_triple_it_is_torchs_to_the_bit(shape, dtype, gaussian):
    matrix = gaussian(shape, 1, dtype)
    kept = matrix.clone()
    found = orthogonalise(matrix, [JORDAN], 5)
    # torch's works in place, so it gets a copy; ours is not to.
    assert torch.equal(found, of_torch(kept.clone(), JORDAN, 5, 1e-7))
    assert found.dtype == torch.bfloat16
    assert torch.equal(matrix, kept)


def test_eps_bounds_the_norm(gaussian):
    matrix = 1e-9 * gaussian((4, 6), 2) / gaussian((4, 6), 2).norm()
    assert orthogonalise(matrix, [JORDAN], 0, dtype=torch.float64).norm() == pytest.approx(1e-2)  # 1e-9/1e-7
    assert orthogonalise(matrix, [JORDAN], 0, eps=1e-15, dtype=torch.float64).norm() == pytest.approx(1)
    assert torch.equal(orthogonalise(torch.zeros(3, 4), [JORDAN], 5), torch.zeros(3, 4, dtype=torch.bfloat16))


OPTIMIZERS = [AdaMuon, AMOMuon, MARSM, ROOT, TEON, TurboMuon]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), ()], ids=str)
def test_other_parameters_are_refused(optimizer, shape):
    message = (
        rf"params: {optimizer.__name__} orthogonalises matrices, got a parameter of shape \({', '.join(map(str, shape))},?\); give it to"
    )
    with pytest.raises(ValueError, match=message):
        optimizer([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(shape))])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_closures_missing_and_zero_gradients(optimizer):
    still, idle = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    one = optimizer([still, idle], weight_decay=0.0)

    def closure():
        assert torch.is_grad_enabled()
        still.grad = torch.zeros(3, 4)
        return 7.0

    assert one.step(closure) == 7.0
    assert torch.equal(still.detach(), torch.ones(3, 4))
    assert torch.equal(idle.detach(), torch.ones(3, 4))
    assert list(one.state) == [still]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loaded_state_goes_on_as_before(optimizer, gaussian):
    """Two optimizers, one from the other's checkpoint after three steps, make the same fourth and fifth to the bit."""
    first, second = (nn.Parameter(gaussian((4, 6), 0, torch.float32)) for _ in range(2))
    one = optimizer([first])
    for seed in range(1, 4):
        first.grad = gaussian((4, 6), seed, torch.float32)
        one.step()
    second.data.copy_(first.data)
    other = optimizer([second], lr=9.0)
    other.load_state_dict(deepcopy(one.state_dict()))  # torch would share the tensors
    for seed in range(4, 6):
        first.grad, second.grad = gaussian((4, 6), seed, torch.float32), gaussian((4, 6), seed, torch.float32)
        one.step()
        other.step()
        assert torch.equal(first, second)
