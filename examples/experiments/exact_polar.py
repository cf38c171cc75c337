"""The exact polar factor in the place of torch.optim.Muon's Newton–Schulz iteration: what an unlimited budget would buy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon as torch_muon


def polar_factor(matrix: Tensor) -> Tensor:
    """Q = UVᵀ of M = UΣVᵀ, any shape and dtype: (MMᵀ)^(−1/2)·M on the short side, in float64.

    From the eigenvectors of the Gram matrix, several times as fast as an SVD. Its rounding enters with κ²: ‖QQᵀ − I‖ is about 1e-16·κ²,
    so that up to κ = 1e4 it is under 1e-8, where float32 weights end. A direction whose σ is under 1e-7 of the largest is left at zero
    or near it: its sign is not known.
    """
    x = matrix.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    square, u = torch.linalg.eigh(x @ x.T)
    inverse = torch.where(square > square[-1] * 1e-14, square, torch.inf).rsqrt()
    q = (u * inverse) @ (u.T @ x)
    return (q.T if matrix.shape[0] > matrix.shape[1] else q).to(matrix.dtype)


@contextmanager
def exact_polar() -> Iterator[None]:
    """Let every torch.optim.Muon of the process take exact polar factors, whatever its steps and coefficients are, and undo that afterwards."""

    def exact(grad: Tensor, ns_coefficients: Any, ns_steps: int, eps: float) -> Tensor:
        return polar_factor(grad)

    before = torch_muon._zeropower_via_newtonschulz
    torch_muon._zeropower_via_newtonschulz = exact
    try:
        yield
    finally:
        torch_muon._zeropower_via_newtonschulz = before
