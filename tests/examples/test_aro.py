"""ARO: the paper's formulas in float64 NumPy, the cases in which it is Muon, and what a recorder reads of it."""

import numpy as np
import pytest
import torch
import xarray as xr
from contract.transcriptions_examples import aro
from torch import nn

from optiscope.examples.optimizers.aro import ARO, next_rotation, rotated_direction, row_normalise
from optiscope.hooks import attach


def matrix(rows, cols, spectrum=None, seed=0):
    """A float64 matrix, with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    if spectrum is None:
        return x
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ vt


def polar(x):
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u @ vt


# Not signs of a square matrix: there RᵀM = T·sign(R'ᵀM)^(−T), T triangular, has exact zeros, whose sign is the rounding's.
@pytest.mark.parametrize(("base", "shape"), [("row", (5, 5)), ("row", (3, 7)), ("row", (7, 3)), ("sign", (3, 7)), ("sign", (7, 3))])
def test_steps_are_those_of_the_paper(base, shape):
    w = nn.Parameter(matrix(*shape))
    optimizer = ARO([w], lr=0.1, momentum=0.9, base=base, weight_decay=0.5)
    reference = aro(shape, base=base)
    for seed in range(1, 7):
        w.grad = matrix(*shape, seed=seed)
        before = w.detach().numpy().copy()
        kept = reference(w.grad.numpy(), before)
        optimizer.step()
        np.testing.assert_allclose(optimizer.state[w]["momentum_buffer"], kept.momentum, rtol=1e-13, atol=1e-15)
        # Largest seen: 4e-16.
        np.testing.assert_allclose(w.detach(), before * (1 - 0.1 * 0.5) - 0.1 * kept.update, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9)], ids=str)
def test_rotated_into_the_left_singular_vectors_it_is_muon(shape):
    m = matrix(*shape)
    u = torch.linalg.svd(m).U
    assert torch.dist(rotated_direction(m, u, row_normalise), polar(m)) < 1e-12  # seen: 3e-15
    # The identity is another rotation, and signs another f.
    assert torch.dist(rotated_direction(m, torch.eye(shape[0], dtype=m.dtype), row_normalise), polar(m)) > 0.1
    assert torch.dist(rotated_direction(m, u, torch.sign), polar(m)) > 0.1


def test_rotations_of_a_momentum_that_stands_still_tend_to_its_singular_vectors():
    """Orthogonal iteration on MMᵀ: the error of neighbouring directions falls by (σ_{i+1}/σ_i)² = 1/4 a step."""
    m, r = matrix(5, 8, [16, 8, 4, 2, 1]), torch.eye(5, dtype=torch.float64)
    errors = []
    for _ in range(24):
        r = next_rotation(m, r, row_normalise)
        assert torch.dist(r.mT @ r, torch.eye(5, dtype=r.dtype)) < 1e-13  # seen: 1.3e-15
        errors.append(torch.dist(rotated_direction(m, r, row_normalise), polar(m)).item())
    assert errors[0] > 0.1
    assert errors[-1] < 1e-12
    slope = np.diff(np.log(errors[4:16])).mean()
    assert slope == pytest.approx(np.log(1 / 4), rel=0.1)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)], ids=str)
def test_row_normalised_updates_have_the_size_of_a_polar_factor(shape):
    """‖R f(RᵀM)‖_F = √r for any rotation: every one of the r rows has length 1."""
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = ARO([w], lr=1.0, momentum=0.0)
    w.grad = matrix(*shape)
    optimizer.step()
    assert w.detach().square().mean().sqrt().item() == pytest.approx(1 / np.sqrt(max(shape)), rel=1e-14)


def test_zero_gradient_moves_nothing():
    w = nn.Parameter(torch.ones(3, 4))
    optimizer = ARO([w])
    w.grad = torch.zeros(3, 4)
    optimizer.step()
    assert torch.equal(w.detach(), torch.ones(3, 4))


def test_what_it_cannot_take_is_refused():
    with pytest.raises(ValueError, match="base: expected one of row, sign; got 'adam'"):
        ARO([nn.Parameter(torch.ones(2, 2))], base="adam")
    with pytest.raises(ValueError, match=r"params: ARO rotates matrices, got a parameter of shape \(3,\)"):
        ARO([nn.Parameter(torch.ones(3))])


def test_recorded_numbers(tmp_path):
    """Momentum as transcribed; the update, decay taken out, of the size of a polar factor, 1/√max(m, n), at every step."""
    w = nn.Parameter(5 * matrix(4, 9).float())
    optimizer, reference, expected = ARO([w], lr=0.01, momentum=0.9, weight_decay=2.0), aro((4, 9)), []
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        for seed in range(1, 6):
            w.grad = matrix(4, 9, seed=seed).float()
            expected.append(np.sqrt(np.mean(reference(w.grad.double().numpy(), None).momentum ** 2)))
            optimizer.step()
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as run:
        update, second = run["update"].load(), run["second_moment"].load()
    np.testing.assert_allclose(update["momentum_rms"].values[:, 0], expected, rtol=1e-6)  # float32 state; seen: 2.9e-8
    # Weights of 5 are rounded to float32 at every step, beside updates of 0.003: seen: 2.2e-5.
    np.testing.assert_allclose(update["update_rms_per_lr"].values[:, 0], 1 / 3, rtol=1e-4)
    assert (second["second_moment_form"].values == -1).all()
