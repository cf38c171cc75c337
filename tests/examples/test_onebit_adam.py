"""1-bit Adam: Adam to the bit before the freeze, the paper's compressed steps after it, and what a recorder reads of both."""

import numpy as np
import pytest
import torch
import xarray as xr
from contract.transcriptions_examples import onebit_adam
from torch import nn
from torch.optim import Adam, AdamW

from optiscope.examples.optimizers.onebit_adam import OneBitAdam, compress
from optiscope.hooks import attach

FREEZE = 3


def gradient(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_compression_is_one_bit_and_a_scale():
    x = torch.tensor([[3.0, -1.0], [0.0, -4.0]])
    assert torch.equal(compress(x), torch.tensor([[2.0, -2.0], [2.0, -2.0]]))
    # What a server would do to a single worker's message: nothing.
    assert torch.equal(compress(compress(x)), compress(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_before_the_freeze_it_is_adam_to_the_bit(decay, dtype):
    ours, theirs = (nn.Parameter(gradient((4, 5), 0, dtype)) for _ in range(2))
    optimizer = OneBitAdam([ours], lr=0.01, weight_decay=decay, freeze_step=5)
    reference = AdamW([theirs], lr=0.01, weight_decay=decay, foreach=False) if decay else Adam([theirs], lr=0.01, foreach=False)
    for seed in range(1, 7):
        ours.grad, theirs.grad = gradient((4, 5), seed, dtype), gradient((4, 5), seed, dtype)
        optimizer.step()
        reference.step()
        assert torch.equal(ours, theirs) == (seed <= 5)
    for key in ("exp_avg", "exp_avg_sq"):
        assert not torch.equal(optimizer.state[ours][key], reference.state[theirs][key])


@pytest.mark.parametrize("shape", [(4, 5), (6,)], ids=str)
def test_steps_are_those_of_the_paper(shape):
    w = nn.Parameter(gradient(shape, 0))
    optimizer = OneBitAdam([w], lr=0.1, weight_decay=0.5, freeze_step=FREEZE)
    reference = onebit_adam(shape, FREEZE)
    for seed in range(1, 9):
        w.grad = gradient(shape, seed)
        before = w.detach().numpy().copy()
        kept = reference(w.grad.numpy(), before)
        optimizer.step()
        np.testing.assert_allclose(optimizer.state[w]["exp_avg"], kept.momentum, atol=1e-14)
        np.testing.assert_allclose(optimizer.state[w]["exp_avg_sq"], kept.second, rtol=1e-13)
        np.testing.assert_allclose(w.detach(), before * (1 - 0.1 * 0.5) - 0.1 * kept.update, atol=1e-13)


def test_error_feedback_loses_nothing():
    """Σ m̄_t + e_T = Σ m_t, with m_t = β₁·m̄_{t−1} + (1 − β₁)·g_t formed outside the optimizer; and v stands still."""
    w = nn.Parameter(gradient((4, 5), 0))
    optimizer = OneBitAdam([w], freeze_step=2)
    exact, sent, frozen = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64), None
    for seed in range(1, 40):
        w.grad = gradient((4, 5), seed)
        before = optimizer.state[w]["exp_avg"].clone() if seed > 1 else torch.zeros_like(exact)
        optimizer.step()
        state = optimizer.state[w]
        if seed <= 2:
            assert "error" not in state
            frozen = state["exp_avg_sq"].clone()
            continue
        exact += 0.9 * before + 0.1 * w.grad
        sent += state["exp_avg"]
        assert state["exp_avg"].abs().unique().numel() == 1
        assert torch.equal(state["exp_avg_sq"], frozen)
    assert torch.dist(sent + state["error"], exact) < 1e-13
    assert torch.dist(sent, exact) > 0.1  # without the error it does not hold


def test_a_freeze_before_the_first_step_is_refused():
    with pytest.raises(ValueError, match=r"freeze_step: expected 1 or more, .*; got 0"):
        OneBitAdam([nn.Parameter(torch.ones(2))], freeze_step=0)


def test_recorded_intent_where_bfloat16_weights_cannot_follow(tmp_path):
    """Weights of 1 do not move by 1e-5 in bfloat16. Of gradients ±g both Adam and the compressed step mean ±1 everywhere."""
    w = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    optimizer = OneBitAdam([w], lr=1e-5, freeze_step=1)
    signs = gradient((3, 4), 0).sign().to(w.dtype)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        for size in (0.5, 0.5, 1.0):
            w.grad = size * signs
            optimizer.step()
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as run:
        update = run["update"].load()
    assert update["update_rms"].values[:, 0].tolist() == [0.0] * 3
    # Step 3: m = 0.9·0.095 + 0.1 = 0.1855, over 1 − 0.9³ = 0.271, over √v̂ = 0.5 of the frozen v. Expected in bfloat16, within 0.4 %.
    np.testing.assert_allclose(update["update_rms_intended"].values[:, 0], [1, 1, 0.1855 / 0.271 / 0.5], rtol=0.02)
