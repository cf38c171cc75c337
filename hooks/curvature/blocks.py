"""Blocks of the Hessian of one matrix: what lies inside Adam-mini's blocks, and exact Hessians of a few rows (arXiv 2406.16793)."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...diagnostics.catalogue import EXACT_BLOCKS
from ...diagnostics.quantities.adam_mini import row_blocks
from ..observing.accelerator import as_array
from ..observing.matrix import Matrix
from ..observing.tensor_sizes import tensor_rms
from .diagonal import Region
from .hessian_products import Products
from .probes import Probes

# Columns of an exact Hessian that are made in one backward pass, and elements that their directions may have; memory grows with both.
_AT_ONCE, _ELEMENTS = 16, 1 << 24


def block_probes(
    products: Products, index: int, matrix: Matrix, block_of_row: NDArray[np.int64], count: int, probes: Probes
) -> tuple[list[float], list[float]]:
    """‖(Hu)_b‖² and ‖(Hu)_j‖² for `count` Rademacher probes, each on one block b of the matrix j, drawn among those with a gradient.

    A block without one (a token that is not in the batch) has no curvature either, and takes no part in a ratio of sums.
    """
    live = np.unique(block_of_row[_rows_with_gradient(products.gradient[index], matrix)])
    inside: list[float] = []
    column: list[float] = []
    for k in probes.integers(len(live), count) if len(live) else []:
        rows = torch.as_tensor(np.flatnonzero(block_of_row == live[k]), device=matrix.parameter.device)
        direction = torch.zeros(matrix.parameter.shape, dtype=matrix.parameter.dtype, device=matrix.parameter.device)
        block = matrix.of(direction)[rows]
        matrix.of(direction)[rows] = probes.like(block, "rademacher")
        product = matrix.of(products.of([index], [direction])[0])
        inside.append(tensor_rms(product[rows]) ** 2 * block.numel())
        column.append(tensor_rms(product) ** 2 * product.numel())
    return inside, column


def partition(matrix: Matrix) -> tuple[str, NDArray[np.int64]]:
    """Name of Adam-mini's partition of a matrix, and the block of every row."""
    return row_blocks(matrix.operator, matrix.rows, matrix.cols, matrix.heads)


def window(gradient: Tensor, matrix: Matrix, limit: int, probes: Probes) -> Region | None:
    """Consecutive rows, a power of two of them, 8 at most, with together up to `limit` coordinates, begun at a row with a gradient.

    None where not even one row is as short, or none has a gradient.
    """
    live = _rows_with_gradient(gradient, matrix)
    most = min(limit // matrix.cols, matrix.rows, EXACT_BLOCKS)
    if not most or not len(live):
        return None
    count = 1 << (most.bit_length() - 1)
    start = min(int(live[probes.integers(len(live), 1)[0]]), matrix.rows - count)
    return Region(matrix, start, start + count)


def exact_hessian(products: Products, index: int, region: Region) -> NDArray[np.floating[Any]]:
    """The Hessian over a region's coordinates, row by row, shape (d, d), made column by column."""
    parameter = region.matrix.parameter
    size = region.of(parameter).numel()
    at_once = max(1, min(_AT_ONCE, _ELEMENTS // parameter.numel()))
    found: list[Tensor] = []
    for first in range(0, size, at_once):
        chosen = range(first, min(first + at_once, size))
        directions = torch.zeros((len(chosen), *parameter.shape), dtype=parameter.dtype, device=parameter.device)
        for i, direction in zip(chosen, directions, strict=True):
            region.of(direction).view(-1)[i] = 1
        found += [region.of(column).reshape(-1) for column in products.columns(index, directions)]
    return as_array(torch.stack(found))


def _rows_with_gradient(gradient: Tensor, matrix: Matrix) -> NDArray[np.int64]:
    return np.flatnonzero(as_array(matrix.of(gradient.detach()).ne(0).any(dim=1)))
