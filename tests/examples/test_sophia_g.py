"""Sophia-G: the paper's formulas in float64 NumPy, the authors' code, the limits of the curvature, and what a recorder reads."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from contract.transcriptions_examples import sophia_g
from sophia_opt import SophiaG as AuthorsSophiaG
from torch import nn

from optiscope.examples.optimizers.sophia_g import SophiaG
from optiscope.hooks import attach

TOKENS = 12


def gradient(seed, shape=(4, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_steps_are_those_of_the_paper(every):
    w = nn.Parameter(gradient(0))
    optimizer = SophiaG([w], lr=0.1, gamma=1.0, weight_decay=0.5, every=every)
    drawn = None
    reference = sophia_g(lambda: drawn, TOKENS, gamma=1.0)
    clipped = 0
    for t in range(1, 9):
        assert optimizer.hessian_due == ((t - 1) % every == 0)
        drawn = None
        if optimizer.hessian_due:
            w.grad = gradient(100 + t)
            drawn = w.grad.numpy()
            optimizer.update_hessian(tokens=TOKENS)
        w.grad = gradient(t)
        before = w.detach().numpy().copy()
        kept = reference(w.grad.numpy(), before)
        optimizer.step()
        np.testing.assert_allclose(optimizer.state[w]["hessian"], kept.second, rtol=1e-13)
        np.testing.assert_allclose(w.detach(), before * (1 - 0.1 * 0.5) - 0.1 * kept.update, atol=1e-14)
        clipped += (np.abs(kept.update) == 1).sum()
    assert 0.05 < clipped / (8 * w.numel()) < 0.9  # both branches of the clip were taken


def test_authors_code_takes_the_same_steps():
    """They keep the average of ĝ⊙ĝ and multiply by the batch size in the step; their ε of 1e-15 is added, ours a floor."""
    ours, theirs = (nn.Parameter(gradient(0)) for _ in range(2))
    optimizer, authors = SophiaG([ours], lr=0.1, gamma=0.3, weight_decay=0.2), AuthorsSophiaG([theirs], lr=0.1, rho=0.3, weight_decay=0.2)
    for seed in range(1, 9):
        ours.grad, theirs.grad = gradient(100 + seed), gradient(100 + seed)
        optimizer.update_hessian(tokens=TOKENS)
        authors.update_hessian()
        ours.grad, theirs.grad = gradient(seed), gradient(seed)
        optimizer.step()
        authors.step(bs=TOKENS)
        assert torch.dist(ours, theirs) < 1e-13
        assert torch.dist(optimizer.state[ours]["hessian"], TOKENS * authors.state[theirs]["hessian"]) < 1e-13


@pytest.mark.parametrize(("curvature", "moved"), [(1e30, 0.0), (0.0, 1.0)], ids=["steep", "flat"])
def test_limits_of_the_curvature(curvature, moved):
    """h → ∞: nothing moves. h → 0: every entry by lr·sign(m), none unclipped (a win rate of 0)."""
    w = nn.Parameter(gradient(0))
    before, g = w.detach().clone(), gradient(1)
    optimizer = SophiaG([w], lr=0.1)
    w.grad = torch.full_like(g, curvature**0.5)
    optimizer.update_hessian(tokens=1)
    w.grad = g
    optimizer.step()
    torch.testing.assert_close(before - w.detach(), 0.1 * moved * g.sign(), rtol=0, atol=1e-15)


def test_estimate_of_a_logistic_regression_is_its_hessian():
    """h_i = mean p(1 − p)·x_i² for logits θᵀx and 0; the mean of 2,000 estimates lies within 4 of its standard errors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    theta = nn.Parameter(torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64))
    p = torch.sigmoid(x @ theta).detach()
    draws = []
    for _ in range(2000):
        optimizer = SophiaG([theta], betas=(0.9, 0.0))
        drawn = torch.bernoulli(p, generator=generator)
        theta.grad = None
        F.binary_cross_entropy_with_logits(x @ theta, drawn).backward()
        optimizer.update_hessian(tokens=64)
        draws.append(optimizer.state[theta]["hessian"].numpy())
    standard_error = np.std(draws, axis=0) / np.sqrt(len(draws))
    error = np.mean(draws, axis=0) - (p * (1 - p) @ x.square() / 64).numpy()
    assert (np.abs(error) < 4 * standard_error).all()
    # Counting the batch as one draw would be 64 times too small: far outside.
    assert (np.mean(draws, axis=0) * (1 - 1 / 64) > 4 * standard_error).all()


def test_it_is_not_due_again_after_a_resume_in_between():
    w = nn.Parameter(gradient(0))
    optimizer = SophiaG([w], every=4)
    for seed in range(3):
        w.grad = gradient(seed)
        optimizer.step()
    resumed = SophiaG([w], every=4)
    resumed.load_state_dict(optimizer.state_dict())
    assert not resumed.hessian_due
    resumed.step()
    assert resumed.hessian_due


def test_an_interval_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="every: expected 1 or more steps between two estimates of the Hessian, got 0"):
        SophiaG([nn.Parameter(torch.ones(2))], every=0)


def test_recorded_intent_where_bfloat16_weights_cannot_follow(tmp_path):
    """Weights of 1 do not move by 1e-5 in bfloat16; meant was clip(m/ε, 1) = sign(m), and after a steep estimate less."""
    w = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    optimizer = SophiaG([w], lr=1e-5, gamma=1.0)
    with attach(optimizer, None, tmp_path / "run.zarr", every=1, on_error="raise"):
        w.grad = torch.full_like(w, 2.0)
        optimizer.step()
        optimizer.update_hessian(tokens=10)  # h = 0.01·10·4 = 0.4, against m = 0.07·(1 + 0.965)
        optimizer.step()
    with xr.open_datatree(tmp_path / "run.zarr", engine="zarr") as run:
        update = run["update"].load()
    assert update["update_rms"].values[:, 0].tolist() == [0.0, 0.0]
    # m and h are kept in bfloat16, each within 0.4 %.
    np.testing.assert_allclose(update["update_rms_intended"].values[:, 0], [1, 0.07 * 1.965 / 0.4], rtol=0.02)
