"""Turbo-Muon: the scaling and the iteration in float64, what ε does, and what a recorder predicts and reads."""

import numpy as np
import pytest
import torch
import xarray as xr
from contract.harness import Expected
from torch import nn

from optiscope.examples.optimizers.turbo_muon import AOL, TurboMuon, aol_orthogonalise
from optiscope.hooks import attach

LR, DECAY, MU = 0.02, 0.5, 0.95
SHAPES = [(5, 5), (3, 7), (7, 3), (1, 4)]


def scaled(matrix):
    """diag(d)·M with d_i = (Σ_j |(MMᵀ)_ij|)^(−1/2), rows of the shorter side, by the formula; zero rows stay zero."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    short = np.array([row / np.sqrt(sum(abs(float(row @ other)) for other in short)) if row.any() else row for row in short])
    return short if matrix.shape[0] <= matrix.shape[1] else short.T


def transcription(shape, through_svd, nesterov=True):
    """b ← μb + (1 − μ)g; U = 0.2√max(m, n)·p_4(…p_1(diag(d)·((1 − μ)g + μb)))."""
    b = np.zeros(shape)

    def step(g, w):
        nonlocal b
        b = MU * b + (1 - MU) * g
        n = (1 - MU) * g + MU * b if nesterov else b
        return Expected(b, None, 0.2 * np.sqrt(max(shape)) * through_svd(scaled(n), AOL, start="as it is"))

    return step


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_those_of_the_paper(shape, nesterov, gaussian, through_svd):
    w = nn.Parameter(gaussian(shape, 0))
    optimizer = TurboMuon([w], lr=LR, weight_decay=DECAY, nesterov=nesterov, ns_dtype=torch.float64)
    reference = transcription(shape, through_svd, nesterov)
    for seed in range(1, 9):
        w.grad = gaussian(shape, seed)
        before = w.detach().numpy().copy()
        kept = reference(w.grad.numpy(), before)
        optimizer.step()
        np.testing.assert_allclose(optimizer.state[w]["momentum_buffer"], kept.momentum, atol=1e-14)
        np.testing.assert_allclose(w.detach(), before * (1 - LR * DECAY) - LR * kept.update, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_start_has_no_singular_value_above_one(shape, dtype, gaussian):
    """Before any step: diag(d)·M; rows of M may differ in size by thousands."""
    matrix = gaussian(shape, 3) * torch.logspace(-2, 2, shape[0], dtype=torch.float64).unsqueeze(1)
    kept = matrix.clone()
    start = aol_orthogonalise(matrix, [], dtype=dtype).double()
    exact = dtype == torch.float64
    np.testing.assert_allclose(start, scaled(matrix.numpy()), rtol=1e-13 if exact else 3e-2)
    assert torch.linalg.svdvals(start)[0] <= 1 + (1e-12 if exact else 1e-2)
    assert torch.equal(matrix, kept)


def test_an_eps_for_norms_is_too_large_for_squares(gaussian):
    """Row norms of 1e-6: with ε = 1e-7, above their squares, the update shrinks; with ε = 1e-30 it is what it was."""
    matrix = gaussian((6, 9), 4)
    small = 1e-6 * matrix / matrix.norm(dim=1, keepdim=True)
    expected = aol_orthogonalise(matrix / matrix.norm(dim=1, keepdim=True), AOL, dtype=torch.float64)
    assert aol_orthogonalise(small, AOL, eps=1e-7, dtype=torch.float64).norm() < 0.6 * expected.norm()
    torch.testing.assert_close(aol_orthogonalise(small, AOL, dtype=torch.float64), expected)
    torch.testing.assert_close(aol_orthogonalise(1e-8 * small, AOL, dtype=torch.float32).double(), expected, atol=1e-5, rtol=0)


def test_a_run_predicts_from_the_scaled_matrix(tmp_path, gaussian, through_svd):
    w = nn.Parameter(0.01 * gaussian((6, 9), 0, torch.float32))
    optimizer = TurboMuon([w], lr=LR, weight_decay=DECAY, ns_dtype=torch.float64)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        w.grad = gaussian((6, 9), 5, torch.float32)
        optimizer.step()
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as run:
        geometry = run["geometry"].load().isel(step=0, matrix=0)
    (schedule,) = geometry.attrs["ns_schedules"]
    assert schedule == {"coefficients": [list(triple) for triple in AOL], "eps": 1e-30, "scaling": "aol"}
    m = w.grad.double().numpy()  # the first momentum is a multiple of it
    o = through_svd(scaled(m), AOL, start="as it is")
    residual = np.linalg.norm(np.eye(6) - o @ o.T) / np.sqrt(6)
    u, sigma, vt = np.linalg.svd(m, full_matrices=False)
    assert float(geometry["ns_residual"][4]) == pytest.approx(residual, rel=1e-4)
    assert float(geometry["ns_residual_achieved"]) == pytest.approx(residual, rel=1e-3)
    assert float(geometry["ns_residual_polar"][4]) == pytest.approx(np.linalg.norm(o - u @ vt) / np.sqrt(6), rel=1e-4)
    assert float(geometry["alignment"]) == pytest.approx((m * o).sum() / sigma.sum(), rel=1e-4)
    assert float(geometry["condition_number"]) == pytest.approx(sigma[0] / sigma[-1], rel=1e-5)
