"""ROOT: clipping, coefficients of the shape, the formulas in float64, and what a recorder reads."""

import numpy as np
import pytest
import torch
import xarray as xr
from contract.harness import Expected
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optiscope.examples.optimizers import root
from optiscope.examples.optimizers.newton_schulz import JORDAN
from optiscope.examples.optimizers.root import ROOT, percentile
from optiscope.hooks import attach

LR, DECAY, MU = 0.02, 0.5, 0.95
OF_SQUARE = (3.4916, -4.8224, 2.1095)


def transcription(shape, through_svd, triple=JORDAN, nesterov=True):
    """b ← μb + g; n = g + μb; outliers by soft thresholding at the 90th percentile of |n|; NS of the rest."""
    b = np.zeros(shape)

    def step(g, w):
        nonlocal b
        b = MU * b + g
        n = g + MU * b if nesterov else b
        outliers = np.sign(n) * np.maximum(np.abs(n) - np.percentile(np.abs(n), 90) - 1e-9, 0)
        return Expected(b, None, 0.2 * np.sqrt(max(shape)) * through_svd(n - outliers, [triple] * 5))

    return step


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (1, 4)], ids=str)
def test_steps_are_those_of_the_paper(shape, nesterov, gaussian, through_svd, monkeypatch):
    monkeypatch.setitem(root.OF_SHAPE, (3, 7), OF_SQUARE)
    w = nn.Parameter(gaussian(shape, 0))
    optimizer = ROOT([w], lr=LR, weight_decay=DECAY, nesterov=nesterov, ns_dtype=torch.float64)
    reference = transcription(shape, through_svd, OF_SQUARE if 7 in shape else JORDAN, nesterov)
    for seed in range(1, 9):
        w.grad = gaussian(shape, seed)
        before = w.detach().numpy().copy()
        kept = reference(w.grad.numpy(), before)
        optimizer.step()
        np.testing.assert_allclose(optimizer.state[w]["momentum_buffer"], kept.momentum, atol=1e-14)
        np.testing.assert_allclose(w.detach(), before * (1 - LR * DECAY) - LR * kept.update, atol=1e-12)


@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 5))
def test_the_percentile_is_numpys(count, q, seed):
    values = np.random.default_rng(seed).standard_normal(count)
    assert float(percentile(torch.from_numpy(values), q)) == pytest.approx(np.quantile(values, q), abs=1e-12)


def test_clipping_removes_the_outliers_and_nothing_else(gaussian):
    """What the iteration is given has no entry beyond t, and is the input where that is within t."""
    seen = []
    w = nn.Parameter(torch.zeros(20, 30, dtype=torch.float64))
    optimizer = ROOT([w], nesterov=False)
    w.grad = gaussian((20, 30), 1)
    w.grad[3, 4] = 1000.0
    original = root.orthogonalise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(root, "orthogonalise", lambda matrix, *rest: (seen.append(matrix.clone()), original(matrix, *rest))[1])
        optimizer.step()
    (given_matrix,), t = seen, optimizer.state[w]["threshold"]
    inside = w.grad.abs() <= t
    assert inside.double().mean() == pytest.approx(0.9)
    assert torch.equal(given_matrix[inside], w.grad[inside])
    assert torch.equal(given_matrix[~inside], t * w.grad[~inside].sign())
    # A single entry of 1000 would be σ_1 by itself; clipped, no direction stands out.
    assert torch.linalg.svdvals(w.grad)[0] > 900
    assert torch.linalg.svdvals(given_matrix)[0] < 15


def test_coefficients_are_those_of_the_shape():
    # The authors' example prints one triple for each of four shapes, either way round.
    optimizer = ROOT([nn.Parameter(torch.ones(2, 2))])
    of, group = optimizer.coefficients, optimizer.param_groups[0]
    assert of((2048, 2048), group) == [OF_SQUARE]
    assert of((3072, 2048), group) == of((2048, 3072), group) == [(3.4509, -4.5790, 1.9325)]
    assert of((2048, 8192), group) == [(2.9794, -3.6674, 1.6207)]
    assert of((16384, 2048), group) == [(3.1943, -3.8221, 1.5322)]
    assert of((2048, 4096), group) == of((7, 3), group) == [(3.4445, -4.7750, 2.0315)]
    assert of((2048, 2048), {**group, "ns_coefficients": [(1.5, -0.5, 0.0)]}) == [(1.5, -0.5, 0.0)]


def test_a_run_holds_the_coefficients_of_every_shape(tmp_path, gaussian, monkeypatch):
    monkeypatch.setitem(root.OF_SHAPE, (4, 6), OF_SQUARE)
    parameters = [nn.Parameter(gaussian(shape, 0, torch.float32)) for shape in ((6, 4), (5, 5))]
    optimizer = ROOT(parameters, ns_steps=4)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        for p in parameters:
            p.grad = gaussian(p.shape, 1, torch.float32)
        optimizer.step()
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as run:
        geometry = run["geometry"].load()
    schedules = [geometry.attrs["ns_schedules"][i]["coefficients"] for i in geometry["ns_schedule"].values[0]]
    assert schedules == [[list(OF_SQUARE)] * 4, [list(JORDAN)] * 4]
    # ‖B‖_F, from NumPy's percentile of the first direction g + 0.95·g.
    for i, p in enumerate(parameters):
        n = 1.95 * p.grad.double().numpy()
        t = np.percentile(np.abs(n), 90)
        assert float(geometry["fro_norm"][0, i]) == pytest.approx(np.linalg.norm(n.clip(-t, t)), rel=1e-6)
