"""What an optimizer keeps of one matrix, as arrays: from what its adapter's readers gave of the parameter."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from ...diagnostics.quantities.adam_mini import row_blocks
from ...diagnostics.quantities.moments import OF_EVERY_COORDINATE, Moments
from ..adapters import Averages, SecondMoment
from ..adapters.kronecker import Kronecker
from .matrix import Matrix


@dataclass(frozen=True)
class OptimizerState:
    """What the readers gave of one parameter.

    Attributes:
        decay, decoupled: λ of the parameter group, and what of it is decoupled.
    """

    second: SecondMoment
    momentum: Tensor | None
    averages: Averages
    kronecker: Kronecker | None
    clipped: Tensor | None
    decay: float
    decoupled: float

    def of(self, matrix: Matrix, as_array: Callable[[Tensor], NDArray[Any]], mean: Callable[[Tensor], float]) -> Moments:
        """The part of one matrix."""
        second, averages = self.second, self.averages
        values = matrix.of(second.values)
        moment = self.momentum if second.form in OF_EVERY_COORDINATE else second.moment
        whole = self.kronecker if matrix.index is None else None
        return Moments(
            v=as_array(values),
            form=second.form,
            mean=mean(values),
            m=None if moment is None else as_array(matrix.of(moment)),
            v_weight=_positive(averages.second),
            m_weight=_positive(averages.first),
            eps=averages.eps,
            coupled_decay=self._coupled_decay(),
            partition=row_blocks(matrix.operator, matrix.rows, matrix.cols, matrix.heads),
            clipped=None if self.clipped is None else as_array(matrix.of(self.clipped)),
            factors=(None, None) if whole is None else tuple(None if f is None else as_array(f) for f in whole.factors),
            bases=(None, None) if whole is None else tuple(None if q is None else as_array(q) for q in whole.bases),
            exponent=nan if whole is None else whole.exponent,
        )

    def copied(self, copy: Callable[[Tensor], Tensor]) -> "OptimizerState":
        """The same of copies."""

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else copy(tensor)

        def sides(kept: Any) -> tuple[Tensor | None, Tensor | None]:
            left, right = map(of, kept)
            return left, right

        whole = self.kronecker
        return replace(
            self, second=replace(self.second, values=copy(self.second.values), moment=of(self.second.moment)), momentum=of(self.momentum),
            kronecker=None if whole is None else replace(whole, factors=sides(whole.factors), bases=sides(whole.bases)), clipped=of(self.clipped),
        )  # fmt: skip

    def _coupled_decay(self) -> float:
        """λ where it is part of the gradient, 0 where it is decoupled, NaN without decay or where it takes another way."""
        if not self.decay or not isfinite(self.decoupled):
            return nan
        if self.decoupled:
            return 0.0
        return self.decay if self.averages.decay_in_gradient else nan


def _positive(weight: float) -> float:
    """NaN for the weight of no gradient at all."""
    return weight if weight > 0 else nan
