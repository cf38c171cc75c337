"""The second moment of every coordinate that the Kronecker factors of a Shampoo-type preconditioner imply."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
