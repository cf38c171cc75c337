"""The Gauss–Newton–Bartlett estimator on logistic regression, where everything has a closed form, and the trap of counting sequences."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optiscope.hooks.curvature.diagonal import Region
from optiscope.hooks.curvature.gauss_newton_bartlett import gauss_newton_bartlett
from optiscope.hooks.curvature.probes import Probes
from optiscope.hooks.curvature.undisturbed import RandomState
from optiscope.hooks.observing.matrix import Matrix

B, D = 64, 3


class Logistic:
    """Two classes with logits (0, wᵀx): h_i = mean p(1 − p)x_i²."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(B, D, generator=generator, dtype=torch.float64)
        self.w = nn.Parameter(torch.randn(1, D, generator=generator, dtype=torch.float64))
        self.matrix = Matrix(self.w, "SGD", "w", "other", -1, 1, D, True)

    def logits(self) -> Tensor:
        z = self.x @ self.w.T
        return torch.cat([torch.zeros_like(z), z], dim=1)

    def estimate(self, draws: int, seed: int = 0, logits: Any = None) -> Any:
        region = Region(self.matrix)
        found, labels = gauss_newton_bartlett(logits or self.logits, RandomState(), [self.w], [region], draws, Probes(seed))
        return found[region], labels

    def chance(self) -> Tensor:
        return torch.sigmoid(self.x @ self.w.detach().T)

    def exact(self) -> Tensor:
        p = self.chance()
        return (p * (1 - p) * self.x**2).mean(0)


def test_the_mean_is_that_of_p_times_one_minus_p_times_x_squared() -> None:
    model = Logistic()
    diagonal, labels = model.estimate(4 * 10**5 // B)
    assert labels == B
    # Of 4·10⁵ labels. The error of 6250 draws of relative deviation 1.4 is 1.8 % an element, less for the mean of three.
    assert abs(diagonal.mean - float(model.exact().mean())) < 3 * diagonal.error


def test_within_one_percent_at_4e5_draws() -> None:
    model = Logistic()
    model.x = model.x[:1]  # one label a draw: what 4·10⁵ of them tell is the mean itself, free of the √2 of many
    model.x = model.x.repeat(4 * 10**5, 1)
    z = model.x @ model.w.detach().T
    drawn = torch.bernoulli(torch.sigmoid(z), generator=torch.Generator().manual_seed(1))
    naive = ((torch.sigmoid(z) - drawn) * model.x).square().mean()
    p = torch.sigmoid(z[:1])
    assert float(naive) == pytest.approx(float((p * (1 - p) * model.x[:1] ** 2).mean()), rel=0.01)


def test_the_relative_deviation_of_one_draw() -> None:
    model, draws = Logistic(), 5000
    diagonal, _ = model.estimate(draws)
    p = model.chance()
    # z = (p − ŷ)x with ŷ ~ Bernoulli(p): E z² = p(1 − p)x², E z⁴ = p(1 − p)(p³ + (1 − p)³)x⁴.
    square, fourth = p * (1 - p) * model.x**2, p * (1 - p) * (p**3 + (1 - p) ** 3) * model.x**4
    variance = (fourth.sum(0) + 3 * (square.sum(0) ** 2 - (square**2).sum(0))) / B**2 - model.exact() ** 2
    relative = math.sqrt(float(variance.mean())) / math.sqrt(float((model.exact() ** 2).mean()))
    rms, deviation = diagonal.spread()
    assert deviation / rms == pytest.approx(relative, rel=0.08)
    assert relative == pytest.approx(1.39, abs=0.03)


def test_counting_sequences_in_place_of_tokens_gives_exactly_an_eighth() -> None:
    model = Logistic()
    sequences = B // 8
    diagonal, labels = model.estimate(1, logits=lambda: model.logits().view(sequences, 8, 2))
    # The same draw, with the gradient of the mean loss and the wrong B: the trap.
    drawn = torch.multinomial(torch.softmax(model.logits(), -1).detach(), 1, generator=torch.Generator().manual_seed(0))
    loss = -torch.log_softmax(model.logits(), -1).gather(1, drawn).mean()
    [gradient] = torch.autograd.grad(loss, [model.w])
    wrong = float((sequences * gradient**2).mean())
    assert labels == B
    assert wrong / diagonal.mean == pytest.approx(1 / 8, rel=1e-12)


@pytest.mark.parametrize(
    ("logits", "error", "text"),
    [
        (lambda m: 3.0, TypeError, "got float"),
        (lambda m: m.logits().detach(), ValueError, "no graph"),
        (lambda m: m.logits()[:, :1], ValueError, r"got \(64, 1\)"),
        (lambda m: m.logits() * math.nan, ValueError, "not finite"),
    ],
)
def test_what_are_no_logits(logits: Any, error: type[Exception], text: str) -> None:
    model = Logistic()
    with pytest.raises(error, match=f"logits_fn: .*{text}"):
        model.estimate(1, logits=lambda: logits(model))
