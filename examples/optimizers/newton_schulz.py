"""The Newton–Schulz iteration that the Muon-type optimizers of this folder share, plainly.

    X₀ = M/max(‖M‖_F, ε);   A = XXᵀ,  X ← aX + (bA + cA²)X,  once per triple (a, b, c)

M has its shorter side first, so that A is as small as it can be. Every step maps the singular values by p(x) = ax + bx³ + cx⁵ and
leaves the singular vectors alone. Order of operations and ε as a lower bound of the norm (not added to it, as in the first public
Muon) are those of torch.optim.Muon, so that the bits are the same; other than there nothing is done in place.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

Triple: TypeAlias = tuple[float, float, float]

# KellerJordan/Muon and torch.optim.Muon, the same triple in every one of five steps.
JORDAN: Triple = (3.4445, -4.7750, 2.0315)


def orthogonalise(
    matrix: Tensor, coefficients: Sequence[Triple], steps: int, eps: float = 1e-7, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """O ≈ UVᵀ of M = UΣVᵀ, in `dtype`. Past the end of `coefficients` their last triple repeats.

    >>> orthogonalise(torch.diag(torch.tensor([3.0, 4.0])), [(1.5, -0.5, 0.0)], 20, dtype=torch.float64).round(decimals=6).diagonal().tolist()
    [1.0, 1.0]
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for step in range(steps):
        x = quintic_step(x, x @ x.T, coefficients[min(step, len(coefficients) - 1)])
    return x.T if tall else x


def quintic_step(x: Tensor, gram: Tensor, triple: Triple) -> Tensor:
    """aX + (bA + cA²)X, given A = XXᵀ."""
    a, b, c = triple
    return torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)


def require_matrices(optimizer: Optimizer) -> None:
    """Refuse parameters that are no matrices.

    Raises:
        ValueError: there is one.
    """
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.ndim != 2:
            raise ValueError(
                f"params: {type(optimizer).__name__} orthogonalises matrices, got a parameter of shape {tuple(p.shape)}; give it to another optimizer"
            )
