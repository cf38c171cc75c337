"""AdaMuon, both forms: the papers' formulas in float64, the size that every update has, and what a recorder reads."""

import numpy as np
import pytest
import torch
import xarray as xr
from contract.transcriptions_references import adamuon
from torch import nn

from optiscope.examples.optimizers.adamuon import AdaMuon
from optiscope.examples.optimizers.newton_schulz import JORDAN, orthogonalise
from optiscope.hooks import attach

LR, DECAY, BETA, BETA2, EPS = 0.02, 0.5, 0.95, 0.999, 1e-8
SHAPES = [(5, 5), (3, 7), (7, 3)]


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sign", [False, True], ids=["v1", "sign"])
def test_steps_are_those_of_the_paper(shape, sign, gaussian):
    w = nn.Parameter(gaussian(shape, 0))
    optimizer = AdaMuon([w], lr=LR, weight_decay=DECAY, sign=sign, ns_dtype=torch.float64)
    reference = adamuon(shape, sign=sign)
    for seed in range(1, 9):
        w.grad = gaussian(shape, seed)
        before = w.detach().numpy().copy()
        kept = reference(w.grad.numpy(), before)
        optimizer.step()
        np.testing.assert_allclose(optimizer.state[w]["momentum_buffer"], kept.momentum, atol=1e-14)
        np.testing.assert_allclose(optimizer.state[w]["second_momentum_buffer"], kept.second, atol=1e-13)
        # Small entries of O are divided by their own size; largest seen: 2e-13.
        np.testing.assert_allclose(w.detach(), before * (1 - LR * DECAY) - LR * kept.update, atol=1e-10)


def test_the_first_update_is_the_sign_of_the_orthogonalised_momentum(gaussian):
    w = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    optimizer = AdaMuon([w], lr=1.0, weight_decay=0.0, ns_dtype=torch.float64)
    w.grad = gaussian((6, 9), 1)
    optimizer.step()
    o = orthogonalise(w.grad, [JORDAN], 5, dtype=torch.float64)
    # ε = 1e-8 beside entries of 0.01 and more.
    torch.testing.assert_close(-w.detach(), 0.2 * o.sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sign", [False, True], ids=["v1", "sign"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_every_update_has_the_same_size(sign, rank, gaussian):
    """|RMS(U)/0.2 − 1| < 1e-6 at all steps in float32, for gradients of any rank and with the iteration in bfloat16."""
    w = nn.Parameter(torch.zeros(8, 12))
    optimizer = AdaMuon([w], lr=1.0, weight_decay=0.0, sign=sign)
    for seed in range(1, 25):
        w.data.zero_()  # so that the weights are the update and nothing is rounded
        w.grad = (gaussian((8, rank), seed) @ gaussian((rank, 12), seed + 100)).float()
        optimizer.step()
        assert rms(w.detach().double().numpy()) / 0.2 == pytest.approx(1, abs=1e-6)


def test_with_signs_v_is_not_corrected(gaussian):
    """At t = 1 V = (1 − β)O², so every entry of Ô is ±1/√(1 − β) = ±4.472, where a corrected V would give ±1."""
    w = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    first = {}
    for sign in (True, False):
        optimizer = AdaMuon([w], sign=sign, ns_dtype=torch.float64)
        w.grad = gaussian((6, 9), 2)
        given = w.grad.sign() if sign else w.grad
        optimizer.step()
        o = orthogonalise(given, [JORDAN], 5, dtype=torch.float64)
        v = optimizer.state[w]["second_momentum_buffer"] / (1 if sign else 1 - BETA2)
        first[sign] = rms((o / (v.sqrt() + EPS)).numpy())
    assert first[True] == pytest.approx(4.472, abs=5e-4)
    assert first[True] == pytest.approx(1 / np.sqrt(1 - BETA), rel=1e-6)
    assert first[False] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("sign", [False, True], ids=["v1", "sign"])
def test_recorded_sizes(sign, tmp_path, gaussian):
    """Target and size of the update are 0.2; the iteration's output cannot be read back from it, and is not."""
    w = nn.Parameter(0.01 * gaussian((6, 9), 0, torch.float32))
    optimizer = AdaMuon([w], lr=LR, weight_decay=DECAY, sign=sign)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        for seed in range(1, 4):
            w.grad = gaussian((6, 9), seed, torch.float32)
            optimizer.step()
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as run:
        update, geometry = run["update"].load(), run["geometry"].load()
    assert (update["update_rms_target"] == 0.2).all()
    np.testing.assert_allclose(update["update_rms_per_lr"], 0.2, rtol=1e-5)  # float32 weights; seen: 3e-8
    assert geometry["ns_residual_achieved"].isnull().all()
    assert geometry["ns_residual"].notnull().all()
    assert geometry.attrs["ns_schedules"] == [{"coefficients": [list(JORDAN)] * 5, "eps": 1e-7}]
    # What the iteration is given: a matrix of signs has the norm √(mn).
    assert np.allclose(geometry["fro_norm"], np.sqrt(54)) == sign
