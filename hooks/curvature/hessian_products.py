"""Products H·u of the Hessian of a loss, by two backward passes or by differences of gradients."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..observing.tensor_sizes import tensor_rms
from .undisturbed import RandomState, shifted

# A direction is made at most this many times longer than one over all weights, where it has few entries.
_LONGEST = 10.0


class Products(Protocol):
    """Products with the Hessian over some of the parameters, given by their indices.

    Attributes:
        method: one of `catalogue.HESSIAN_METHODS`.
        gradient: ∇L, of all parameters.
    """

    method: str
    gradient: list[Tensor]

    def of(self, chosen: Sequence[int], direction: Sequence[Tensor]) -> list[Tensor]:
        """H·u for a direction over the chosen parameters, their part of it."""

    def columns(self, index: int, directions: Tensor) -> Tensor:
        """H_jj·u for many directions of one parameter, of shape (many, *parameter.shape)."""


class Loss:
    """A loss function whose evaluations all begin with the same random numbers, checked."""

    def __init__(self, function: Callable[[], Any], state: RandomState, name: str = "loss_fn") -> None:
        self._function, self._state, self._name = function, state, name

    def __call__(self) -> Tensor:
        """Evaluate it.

        Raises:
            TypeError: it gives no tensor.
            ValueError: not one finite number, or one without a graph.
        """
        self._state.put_back()
        loss = self._function()
        if not isinstance(loss, Tensor):
            raise TypeError(f"{self._name}: expected it to return the loss as a tensor with its graph, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"{self._name}: expected it to return one number, the mean loss, got a tensor of shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise ValueError(f"{self._name}: the loss has no graph; return it without detach() or item(), and not under no_grad()")
        if not torch.isfinite(loss).item():
            raise ValueError(f"{self._name}: the loss is {loss.item()}, so it has no curvature")
        return loss.reshape(())


class DoubleBackward(Products):
    """H·u = ∇⟨∇L, u⟩ (Pearlmutter 1994): exact to rounding. The graph of the gradient serves any number of products."""

    method = "double_backward"

    def __init__(self, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self.gradient = list(torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True))

    def of(self, chosen: Sequence[int], direction: Sequence[Tensor]) -> list[Tensor]:
        inputs = [self._parameters[i] for i in chosen]
        # A gradient without a graph is a constant, and its row of the Hessian zero.
        curved = [(self.gradient[i], u) for i, u in zip(chosen, direction, strict=True) if self.gradient[i].requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in inputs]
        gradients, directions = zip(*curved, strict=True)
        return list(torch.autograd.grad(gradients, inputs, directions, retain_graph=True, materialize_grads=True))

    def columns(self, index: int, directions: Tensor) -> Tensor:
        parameter, gradient = self._parameters[index], self.gradient[index]
        if not gradient.requires_grad:
            return torch.zeros_like(directions)
        # Vectorised by torch.func's vmap, without what importing that by name warns of.
        [found] = torch.autograd.grad(gradient, parameter, directions, retain_graph=True, materialize_grads=True, is_grads_batched=True)
        return found


class CentralDifference(Products):
    """H·u ≈ (∇L(W + hu) − ∇L(W − hu))/2h, for models with a kernel that has no second backward pass.

    h = ε^{1/3}·RMS(W)·√(d/‖u‖²), ε of the weights' format and d their number, which balances the truncation h²/6·∂³L against
    the rounding of gradients, ε·‖∇L‖/h. On a small transformer the mean diagonals of matrices came out
    within 2e-10 (float64) and 1.2e-4 (float32) of the largest one's. Weights of bfloat16 move in steps of 4e-3 of their size and give two digits at best.
    """

    method = "central_difference"

    def __init__(self, loss: Loss, parameters: list[nn.Parameter]) -> None:
        self._loss, self._parameters = loss, parameters
        self.gradient = self._gradient(range(len(parameters)))
        count = sum(p.numel() for p in parameters)
        square = sum(tensor_rms(p) ** 2 * p.numel() for p in parameters)
        epsilon = max(float(torch.finfo(p.dtype).eps) for p in parameters)
        self._count = count
        self._size = epsilon ** (1 / 3) * ((square / count) ** 0.5 or 1.0)

    def of(self, chosen: Sequence[int], direction: Sequence[Tensor]) -> list[Tensor]:
        parameters, directions = [self._parameters[i] for i in chosen], list(direction)
        length = sum(tensor_rms(u) ** 2 * u.numel() for u in directions) ** 0.5
        h = self._size * min(self._count**0.5 / length, _LONGEST) if length else self._size
        with shifted(parameters, directions, h):
            ahead = self._gradient(chosen)
        with shifted(parameters, directions, -h):
            behind = self._gradient(chosen)
        return [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]

    def columns(self, index: int, directions: Tensor) -> Tensor:
        return torch.stack([self.of([index], [u])[0] for u in directions])

    def _gradient(self, chosen: Sequence[int]) -> list[Tensor]:
        return list(torch.autograd.grad(self._loss(), [self._parameters[i] for i in chosen], materialize_grads=True))
