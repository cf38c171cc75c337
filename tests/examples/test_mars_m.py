"""MARS-M: the paper's formulas in float64, Muon where there is nothing to correct, and what a recorder reads."""

import numpy as np
import pytest
import torch
from contract.harness import Expected
from torch import nn

from optiscope.examples.optimizers.mars_m import MARSM, corrected
from optiscope.examples.optimizers.newton_schulz import JORDAN

LR, DECAY, BETA, GAMMA = 0.02, 0.5, 0.95, 0.025


def transcription(shape, through_svd, beta=BETA, gamma=GAMMA):
    """c_t, its clip to the unit ball, the EMA and Muon's step, with g_0 = 0."""
    m, last = np.zeros(shape), np.zeros(shape)

    def step(g, w):
        nonlocal m, last
        c = g + gamma * beta / (1 - beta) * (g - last)
        if np.linalg.norm(c) > 1:
            c = c / np.linalg.norm(c)
        m, last = beta * m + (1 - beta) * c, g
        return Expected(m, None, 0.2 * np.sqrt(max(shape)) * through_svd(m, [JORDAN] * 5))

    return step


@pytest.mark.parametrize("size", [0.01, 1.0], ids=["inside", "clipped"])
@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3)], ids=str)
def test_steps_are_those_of_the_paper(shape, size, gaussian, through_svd):
    w = nn.Parameter(gaussian(shape, 0))
    optimizer = MARSM([w], lr=LR, weight_decay=DECAY, ns_dtype=torch.float64)
    reference = transcription(shape, through_svd)
    for seed in range(1, 9):
        w.grad = size * gaussian(shape, seed)
        assert (w.grad.norm() > 1) == (size == 1)
        before = w.detach().numpy().copy()
        kept = reference(w.grad.numpy(), before)
        optimizer.step()
        np.testing.assert_allclose(optimizer.state[w]["momentum_buffer"], kept.momentum, atol=1e-15)
        np.testing.assert_allclose(w.detach(), before * (1 - LR * DECAY) - LR * kept.update, atol=1e-13)


def test_the_correction_at_the_defaults():
    """A gradient that turns from 0 to 0.1 is extrapolated by 0.475, and nothing leaves the unit ball."""
    group = MARSM([nn.Parameter(torch.ones(2, 2))]).param_groups[0]
    factor = group["gamma"] * group["momentum"] / (1 - group["momentum"])
    assert factor == pytest.approx(0.475)
    zero, tenth = torch.zeros(2, 2, dtype=torch.float64), torch.full((2, 2), 0.1, dtype=torch.float64)
    torch.testing.assert_close(corrected(tenth, zero, factor), 1.475 * tenth)
    torch.testing.assert_close(corrected(tenth, tenth, factor), tenth)
    assert corrected(100 * tenth, zero, factor).norm() == pytest.approx(1)


@pytest.mark.parametrize("gamma", [0.0, 0.025])
def test_without_correction_it_is_muon_on_an_average(gamma, gaussian):
    """γ = 0 and ‖g‖ ≤ 1: torch's Muon without Nesterov, to the bit; with γ it is not."""
    ours, theirs = (nn.Parameter(gaussian((4, 9), 0, torch.float32)) for _ in range(2))
    one = MARSM([ours], lr=LR, gamma=gamma, weight_decay=DECAY)
    other = torch.optim.Muon([theirs], lr=LR, weight_decay=DECAY, nesterov=False, adjust_lr_fn="match_rms_adamw")
    for seed in range(1, 6):
        ours.grad, theirs.grad = 0.05 * gaussian((4, 9), seed, torch.float32), 0.05 * gaussian((4, 9), seed, torch.float32)
        assert ours.grad.norm() <= 1
        one.step()
        other.step()
    assert torch.equal(ours, theirs) == (gamma == 0)


def test_the_last_gradient_survives_being_zeroed_in_place(gaussian):
    """A reference to the gradient instead of a copy would become the next gradient, and every difference zero."""
    w = nn.Parameter(gaussian((4, 6), 0))
    optimizer = MARSM([w])
    w.grad = gaussian((4, 6), 1)
    first = w.grad.clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(optimizer.state[w]["last_grad"], first)
