"""The second moment of every coordinate that the Kronecker factors of a Shampoo-type preconditioner imply."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor

Side = Tensor | None


@dataclass(frozen=True)
class Kronecker:
    """A matrix's symmetric Kronecker factors: of its rows, averaging GGᵀ, and of its columns, GᵀG.

    Attributes:
        factors: None for a side without one.
        bases: the matrices whose columns are kept as the factors' eigenvectors (SOAP).
        exponent: p of the LᵖGRᵖ that the optimizer applies; NaN where it applies something else, or that is not known.
    """

    factors: tuple[Side, Side]
    bases: tuple[Side, Side] = (None, None)
    exponent: float = nan


def kept_sides(factors: Any, bases: Any = None, exponent: float = nan) -> Kronecker | None:
    """From two lists as SOAP keeps them, of whatever stands for a side without one; None for what is no matrix's or all empty."""

    def both(kept: Any) -> tuple[Side, Side]:
        left, right = (one if isinstance(one, Tensor) and one.ndim == 2 else None for one in kept)
        return left, right

    if not isinstance(factors, (list, tuple)) or len(factors) != 2:
        return None
    found = both(factors)
    has_bases = isinstance(bases, (list, tuple)) and len(bases) == 2
    return None if found == (None, None) else Kronecker(found, both(bases) if has_bases else (None, None), exponent)


def implied_second_moment(diagonals: Sequence[Tensor]) -> Tensor:
    """V = d_1 ⊗ d_2/Σd_2 ⊗ …, shape (len(d_1), len(d_2), …), from the diagonals of one factor per axis, in gradient units².

    The factor of an axis averages the contraction of G with itself over all other axes: E[GGᵀ] and E[GᵀG] for a matrix. Their
    diagonals are the row and column sums of E[G⊙G], and every trace is E‖G‖²_F. So V has the row and column sums of E[G⊙G], is
    what Adafactor makes of them, and its mean is that of E[G⊙G] exactly. It tells nothing of what lies off the diagonals.

    >>> implied_second_moment([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])])
    tensor([[0.5000, 0.5000],
            [1.5000, 1.5000]])
    """
    product = diagonals[0]
    for diagonal in diagonals[1:]:
        product = product.unsqueeze(-1) * (diagonal / diagonal.sum().clamp(min=torch.finfo(diagonal.dtype).tiny))
    return product
