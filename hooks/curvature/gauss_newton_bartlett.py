"""The Gauss–Newton diagonal by the Gauss–Newton–Bartlett estimator (Sophia, arXiv 2305.14342, Algorithm 2).

Labels ŷ_b are drawn from the model's own softmax, ĝ is the gradient of the mean cross-entropy over them, and ĥ = B·ĝ⊙ĝ. By Bartlett's
identity the single gradients have mean 0 and the Gauss–Newton (here also Fisher) matrix as covariance, so that ĥ is unbiased for the
diagonal of the mean Gauss–Newton matrix. B counts independent draws of a label: tokens, not sequences. It is the Hessian's
diagonal only where logits are linear in the weights. With the true labels in place of drawn ones it would be the empirical
Fisher, which is neither.

One draw has, for many labels, a relative standard deviation of √2 at every element. A draw costs one backward pass; all share
the forward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...diagnostics.quantities.probe_error import bartlett_variance_bound
from ..observing.tensor_sizes import tensor_mean
from .diagonal import Diagonal, Region, at_least_float32
from .probes import Probes
from .undisturbed import RandomState


def gauss_newton_bartlett(
    logits_fn: Callable[[], Any],
    state: RandomState,
    parameters: Sequence[nn.Parameter],
    regions: Sequence[Region],
    count: int,
    probes: Probes,
) -> tuple[dict[Region, Diagonal], int]:
    """Estimate the diagonal on every region with `count` draws of all labels; also B, the labels of one draw."""
    state.put_back()
    log_p = _log_probabilities(logits_fn())
    chances, labels = log_p.detach().exp(), len(log_p)
    found = {region: Diagonal() for region in regions}
    index = {id(p): i for i, p in enumerate(parameters)}
    for draw in range(count):
        drawn = torch.multinomial(chances, 1, generator=probes.on(chances.device))
        loss = -log_p.gather(1, drawn).mean()
        gradient = torch.autograd.grad(loss, list(parameters), retain_graph=draw < count - 1, materialize_grads=True)
        for region, diagonal in found.items():
            estimate = labels * at_least_float32(region.of(gradient[index[id(region.matrix.parameter)]])).square()
            diagonal.add(estimate, bartlett_variance_bound(tensor_mean(estimate)), keep=count > 1)
    return found, labels


def _log_probabilities(logits: Any) -> Tensor:
    """Of shape (labels, classes), in float32 at least.

    Raises:
        TypeError: it is no tensor.
        ValueError: no classes along the last dimension, no graph, or a value that is not finite.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits_fn: expected it to return the logits as a tensor with its graph, got {type(logits).__name__}")
    if logits.ndim == 0 or logits.shape[-1] < 2 or not logits.numel():
        raise ValueError(f"logits_fn: expected logits of shape (…, classes) with at least 2 classes, got {tuple(logits.shape)}")
    if not logits.requires_grad:
        raise ValueError("logits_fn: the logits have no graph; return them without detach(), and not under no_grad()")
    wide = logits.flatten(0, -2) if logits.ndim > 1 else logits[None]
    log_p = torch.log_softmax(at_least_float32(wide), dim=-1)
    if not torch.isfinite(log_p.detach().exp()).all().item():
        raise ValueError("logits_fn: some logits are not finite, so no label can be drawn from them")
    return log_p
