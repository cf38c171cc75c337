"""Everything that one call of `Recorder.curvature` finds on its matrices."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...diagnostics.catalogue import DISTRIBUTIONS, EXACT_BLOCKS, HESSIAN_METHODS, PARTITIONS
from ...diagnostics.quantities.hessian_blocks import (
    POINTS_PER_BLOCK,
    diagonal_dominance,
    in_block_null,
    in_block_share,
    preconditioning_effect,
    tile_map,
)
from ..observing.accelerator import as_array
from ..observing.matrix import Matrix
from ..observing.tensor_sizes import unit_roundoff
from .blocks import block_probes, exact_hessian, partition, window
from .diagonal import Diagonal, Region
from .gauss_newton_bartlett import gauss_newton_bartlett
from .hessian_products import Products
from .hutchinson import hutchinson
from .probes import Probes
from .undisturbed import RandomState


class Estimation:
    """What one call finds.

    Attributes:
        parameters: of the matrices, each once.
        found: quantities of the catalogue, by matrix.
    """

    def __init__(self, matrices: Sequence[Matrix], probes: Probes, distribution: str) -> None:
        self.parameters = list({id(m.parameter): m.parameter for m in matrices}.values())
        self.found: dict[Matrix, dict[str, Any]] = {m: {} for m in matrices}
        self._index = {id(p): i for i, p in enumerate(self.parameters)}
        self._regions = [Region(m) for m in matrices]
        self._windows: list[Region] = []
        self._probes, self._distribution = probes, distribution

    def hessian(self, products: Products, count: int, block_count: int, exact: int) -> None:
        """Hutchinson's diagonal, and on request what is inside blocks, and exact Hessians."""
        if exact:
            windows = [window(products.gradient[self._index[id(m.parameter)]], m, exact, self._probes) for m in self.found]
            self._windows = [w for w in windows if w is not None]
        diagonals = hutchinson(products, self.parameters, [*self._regions, *self._windows], count, self._distribution, self._probes)
        how = {"hessian_method": HESSIAN_METHODS.index(products.method), "hessian_distribution": DISTRIBUTIONS.index(self._distribution)}
        for region in self._regions:
            self.found[region.matrix] |= {**_hessian_diagonal(diagonals[region], region.matrix), **how}
        for region in self._windows:
            diagonal, matrix = diagonals[region], region.matrix
            self.found[matrix] |= {"exact_hutchinson_mean": diagonal.mean, "exact_hutchinson_error": diagonal.error}
            self.found[matrix] |= _exact(exact_hessian(products, self._index[id(matrix.parameter)], region), region, self._probes)
        for matrix in self.found if block_count else ():
            name, blocks = partition(matrix)
            share, error = in_block_share(
                *block_probes(products, self._index[id(matrix.parameter)], matrix, blocks, block_count, self._probes)
            )
            self.found[matrix] |= {
                "hessian_in_block_share": share,
                "hessian_in_block_error": error,
                "hessian_in_block_null": in_block_null(blocks),
                "hessian_partition": PARTITIONS.index(name),
            }

    def gauss_newton(self, logits_fn: Callable[[], Any], state: RandomState, count: int) -> None:
        """The Gauss–Newton diagonal, also on the rows that an exact Hessian was taken of."""
        regions = [*self._regions, *self._windows]
        diagonals, labels = gauss_newton_bartlett(logits_fn, state, self.parameters, regions, count, self._probes)
        for region in self._regions:
            diagonal = diagonals[region]
            self.found[region.matrix] |= {
                "gauss_newton_mean": diagonal.mean,
                "gauss_newton_mean_error": diagonal.error,
                "gauss_newton_draw_mean": diagonal.first_means(),
                "gauss_newton_draws": count,
                "gauss_newton_labels": labels,
            }
            if (quantiles := diagonal.quantiles()) is not None:
                self.found[region.matrix]["gauss_newton_quantile"] = quantiles
        for region in self._windows:
            self.found[region.matrix] |= {
                "exact_gauss_newton_mean": diagonals[region].mean,
                "exact_gauss_newton_error": diagonals[region].error,
            }


def _hessian_diagonal(diagonal: Diagonal, matrix: Matrix) -> dict[str, Any]:
    size = matrix.rows * matrix.cols
    rms, deviation = diagonal.spread()
    found = {
        "hessian_mean": diagonal.mean,
        "hessian_mean_error": diagonal.error,
        "hessian_trace": size * diagonal.mean,
        "hessian_trace_error": size * diagonal.error,
        "hessian_rms": rms,
        "hessian_element_deviation": deviation,
        "hessian_probe_mean": diagonal.first_means(),
        "hessian_probes": len(diagonal.means),
    }
    if (quantiles := diagonal.quantiles()) is not None:
        found |= {"hessian_quantile": quantiles, "hessian_negative_share": diagonal.negative_share()}
    return found


def _exact(hessian: NDArray[np.floating[Any]], region: Region, probes: Probes) -> dict[str, Any]:
    """What an exact Hessian of consecutive rows tells, of all of them and of each row alone."""
    cols, parameter = region.matrix.cols, region.matrix.parameter
    count = len(hessian) // cols
    found: dict[str, Any] = {
        "exact_mean": float(np.trace(hessian, dtype=np.float64)) / len(hessian),
        "hessian_map": tile_map(hessian),
        "preconditioning_size": cols,
    }
    of_rows = [hessian[k : k + cols, k : k + cols] for k in range(0, count * cols, cols)]
    points = [as_array(probes.like(torch.empty(POINTS_PER_BLOCK, cols), "gaussian")) for _ in of_rows]
    effects = [preconditioning_effect(block, x, unit_roundoff(parameter)) for block, x in zip(of_rows, points, strict=True)]
    return found | {
        "preconditioning_ratio": _padded([ratio for ratio, _ in effects]),
        "preconditioning_condition": _padded([kappa for _, kappa in effects]),
        "preconditioning_dominance": _padded([diagonal_dominance(block) for block in of_rows]),
    }


def _padded(values: list[float]) -> NDArray[np.float64]:
    found = np.full(EXACT_BLOCKS, np.nan)
    found[: len(values)] = values
    return found
