"""What single probes of a diagonal add up to on a matrix, or on rows of it: their means, their squares, and the mean diagonal itself."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...diagnostics.catalogue import LEVELS, PROBES
from ...diagnostics.quantities.probe_error import debiased_rms, level_quantiles, probe_error
from ..observing.accelerator import as_array
from ..observing.matrix import Matrix
from ..observing.tensor_sizes import tensor_mean, tensor_rms


@dataclass(frozen=True, eq=False)
class Region:
    """Rows of a matrix, consecutive, all of them or some."""

    matrix: Matrix
    first: int = 0
    end: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The region's part of a tensor that has the parameter's shape."""
        return self.matrix.of(tensor)[self.first : self.end]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in a format that sums do not stall in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass
class Diagonal:
    """Estimates of the diagonal on one region by n probes.

    Attributes:
        means: of the region's elements, by probe.
        bounds: upper bound on the variance of each such mean.
        squares: mean of the elements' squares, by probe.
        total: sum over probes of every element.
    """

    means: list[float] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    total: Tensor | None = None

    def add(self, estimate: Tensor, bound: float, *, keep: bool) -> None:
        """Take one probe's estimate of all elements; `keep` where there will be several, and their mean is of use."""
        self.means.append(tensor_mean(estimate))
        self.bounds.append(bound)
        self.squares.append(tensor_rms(estimate) ** 2)
        if keep:
            self.total = at_least_float32(estimate) if self.total is None else self.total + estimate

    @property
    def mean(self) -> float:
        """Mean over elements and probes."""
        return float(np.mean(self.means))

    @property
    def error(self) -> float:
        """Its standard error."""
        return probe_error(self.means, self.bounds)

    def first_means(self) -> NDArray[np.float64]:
        """The means of the first 64 probes, NaN after the last."""
        found = np.full(PROBES, np.nan)
        kept = self.means[:PROBES]
        found[: len(kept)] = kept
        return found

    def average(self) -> NDArray[np.floating[Any]] | None:
        """The mean over probes of every element."""
        return None if self.total is None else as_array(self.total / len(self.means))

    def spread(self) -> tuple[float, float]:
        """RMS of the diagonal, and of one probe's noise at an element."""
        average = self.average()
        if average is None:
            return float("nan"), float("nan")
        return debiased_rms(float(np.mean(self.squares)), float(np.mean(np.square(average, dtype=np.float64))), len(self.means))

    def quantiles(self) -> NDArray[np.float64] | None:
        """Quantiles over the elements at `catalogue.LEVELS`, None under 64 probes."""
        average = self.average() if len(self.means) >= PROBES else None
        return None if average is None else level_quantiles(average, LEVELS)

    def negative_share(self) -> float:
        """Share of negative elements."""
        average = self.average()
        return float("nan") if average is None else float(np.mean(average < 0))
