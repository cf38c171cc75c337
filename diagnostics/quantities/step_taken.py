"""The step that an optimizer took on one matrix: weights before and after, and the sizes of what it worked with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..catalogue import READABLE_NOISE
from .measured import Measured, quietly
from .update_size import Sizes, reading_noise, sizes, update_without_decay


@dataclass(frozen=True)
class StepTaken:
    """One step on one matrix, shape (rows, cols).

    Attributes:
        weight_before, weight_after: W_t and W_{t+1}, in their own format; arithmetic on them is in float64. Where the step multiplied the weights
            once the update was in them (`weight_factor`), W_{t+1} is what they were before that.
        weight_roundoff: unit roundoff of the format the weights are stored in.
        grad_rms, momentum_rms: RMS of gradient and first moment; NaN where there is none.
        lr: η that scales the update; of the parameter group, or what the optimizer makes of it.
        weight_decay: of the parameter group.
        decoupled_decay: the λ of W(1 − ηλ); 0 where decay is coupled or absent.
        output_scale: s in ΔW = −η·s·O, decay aside; NaN where more than a scale follows the iteration, or there is none.
        row_divisors: d, shape (rows,), in ΔW = −η·s·c·O/d, where c gives O/d the Frobenius norm of O (NorMuon); None where no rows are divided.
        target_rms: RMS of ΔW/η if O were the exact polar factor, under the optimizer's own scaling.
        intended_rms: RMS of the update per learning rate before it was rounded into the weights, decay aside; NaN where not known.
        trust_ratio: the factor by which the optimizer scaled this matrix's step; NaN where it has none.
        weight_factor: the least factor by which the step multiplied weights once the update was in them; 1 where by none, NaN where that is not known.
    """

    weight_before: NDArray[np.floating]
    weight_after: NDArray[np.floating]
    weight_roundoff: float
    grad_rms: float
    momentum_rms: float
    lr: float
    weight_decay: float
    decoupled_decay: float
    output_scale: float = float("nan")
    target_rms: float = float("nan")
    intended_rms: float = float("nan")
    trust_ratio: float = float("nan")
    weight_factor: float = float("nan")
    row_divisors: NDArray[np.floating] | None = None

    @property
    def applied(self) -> NDArray[np.float64]:
        """W_t − W_{t+1}, everything included."""
        return self.weight_before.astype(np.float64) - self.weight_after

    @property
    def update(self) -> NDArray[np.floating]:
        """The update per learning rate, decoupled decay taken out."""
        return update_without_decay(self.weight_before, self.weight_after, self.lr, self.decoupled_decay)

    @cached_property
    def sizes(self) -> Sizes:
        """RMS values of W_t, `applied` and `update`."""
        return sizes(self.weight_before, self.weight_after, self.lr, self.decoupled_decay)

    @cached_property
    def update_noise(self) -> float:
        """Relative rounding error of the applied update as read back."""
        return reading_noise(self.sizes.weight, self.sizes.applied, self.weight_roundoff)

    @cached_property
    def output(self) -> NDArray[np.floating] | None:
        """O, read back from the applied update where nothing but a scale, or known divisors of rows, followed the iteration; None where it is not known so.

        In float32 unless the weights are float64: rounding it is less than what rounding the weights has left.
        """
        if not self.update_noise <= READABLE_NOISE or not np.isfinite(self.output_scale):
            return None
        dtype = np.float64 if self.weight_before.dtype == np.float64 else np.float32
        output = update_without_decay(
            self.weight_before, self.weight_after, self.lr, self.decoupled_decay, divided_by=self.output_scale, dtype=dtype
        )
        if self.row_divisors is None:
            return output
        divisors: NDArray[np.floating] = self.row_divisors.astype(output.dtype)
        undivided: NDArray[np.floating] = output * divisors[:, None]
        norm = float(np.linalg.norm(undivided))
        return undivided * (float(np.linalg.norm(output)) / norm) if norm > 0 else None

    def part(self, axis: int, indices: NDArray[np.int64]) -> "StepTaken":
        """That of some rows (axis 0) or columns (axis 1); what was said of the whole matrix alone stays that of the whole."""
        before, after = (np.asarray(weight.take(indices, axis)) for weight in (self.weight_before, self.weight_after))
        divisors = self.row_divisors.take(indices) if self.row_divisors is not None and axis == 0 else self.row_divisors
        return replace(self, weight_before=before, weight_after=after, row_divisors=divisors)


def joined_step(steps: Sequence[StepTaken]) -> StepTaken:
    """That of [W_1 … W_K]; settings are those of the first."""
    before, after = (np.hstack(list(weights)) for weights in zip(*((s.weight_before, s.weight_after) for s in steps), strict=True))
    return replace(steps[0], weight_before=before, weight_after=after)


@quietly
def measure_update(step: StepTaken) -> Measured:
    """The quantities of the group `update` that a step tells (see the catalogue for each definition)."""
    update_rms, weight_rms = step.sizes.applied, step.sizes.weight
    return {
        "update_rms": update_rms,
        "update_norm": update_rms * float(np.sqrt(step.weight_before.size)),
        "update_rms_per_lr": step.sizes.update,
        "update_rms_target": step.target_rms,
        "update_rms_intended": step.intended_rms,
        "update_noise": step.update_noise,
        "weight_rms": weight_rms,
        "grad_rms": step.grad_rms,
        "momentum_rms": step.momentum_rms,
        "update_to_weight": update_rms / weight_rms if weight_rms > 0 else float("nan"),
        "lr": step.lr,
        "weight_decay": step.weight_decay,
        "trust_ratio": step.trust_ratio,
        "weight_factor": step.weight_factor,
    }
