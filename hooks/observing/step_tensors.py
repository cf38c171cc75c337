"""The step that was taken on one parameter, as tensors and numbers: the steps of its matrices."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ...diagnostics.quantities.step_taken import StepTaken
from .accelerator import to_host
from .matrix import Matrix
from .tensor_sizes import tensor_rms, unit_roundoff


@dataclass(frozen=True)
class StepTensors:
    """Weights around a step, and what the optimizer made the step of.

    Attributes:
        before: the weights.
        after: what the update left of them; the weights after the step have been multiplied by `weight_factor` since.
        momentum, intended: None where there is none, or it is not known (see :class:`StepTaken` for these and the numbers).
        grad_rms: of every matrix, when asked: an accelerator is not waited for before.
        output_scale, target_rms, weight_factor: of every matrix.
        row_divisors: of all rows, shape (…, rows, 1); None where none are divided.
    """

    before: Tensor
    after: Tensor
    momentum: Tensor | None
    intended: Tensor | None
    lr: float
    weight_decay: float
    decoupled_decay: float
    trust_ratio: float
    grad_rms: Mapping[Matrix, Callable[[], float]]
    output_scale: Mapping[Matrix, float]
    target_rms: Mapping[Matrix, float]
    weight_factor: Mapping[Matrix, float]
    row_divisors: Tensor | None = None

    def copied(self, copy: Callable[[Tensor], Tensor]) -> "StepTensors":
        """The same of copies; the weights before the step are one already."""
        momentum, intended, divisors = (
            None if tensor is None else copy(tensor) for tensor in (self.momentum, self.intended, self.row_divisors)
        )
        return replace(self, after=copy(self.after), momentum=momentum, intended=intended, row_divisors=divisors)

    def of(self, matrix: Matrix) -> StepTaken:
        """That of one matrix."""
        momentum, intended = (math.nan if tensor is None else tensor_rms(matrix.of(tensor)) for tensor in (self.momentum, self.intended))
        return StepTaken(
            weight_before=to_host(matrix.of(self.before)),
            weight_after=to_host(matrix.of(self.after)),
            weight_roundoff=unit_roundoff(self.before),
            grad_rms=self.grad_rms[matrix](),
            momentum_rms=momentum,
            lr=self.lr,
            weight_decay=self.weight_decay,
            decoupled_decay=self.decoupled_decay,
            output_scale=self.output_scale[matrix],
            target_rms=self.target_rms[matrix],
            intended_rms=intended,
            trust_ratio=self.trust_ratio,
            weight_factor=self.weight_factor[matrix],
            row_divisors=None if self.row_divisors is None else to_host(matrix.of(self.row_divisors).reshape(-1)),
        )
