"""Reading one parameter around an optimizer step: what the step will overwrite, then one observation per matrix."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...diagnostics.quantities.observation import Gradient, Observation
from ...diagnostics.quantities.rotation import Rotation
from ..adapters import Adapter, Averages, Reader, Reading, number, parameter_state
from ..adapters.names import tensors_in
from ..guard import KeptOut
from .accelerator import SideStream, to_host
from .copies import Copies
from .matrix import Matrix
from .optimizer_state import OptimizerState
from .problem_tensors import ProblemTensors
from .step_tensors import StepTensors
from .tensor_sizes import or_nan, rms_of_norm, tensor_mean, tensor_norm, tensor_rms, unit_roundoff

T = TypeVar("T")

# Weights of a coarser format than this do not tell the update: float32 has 6e-8, float16 5e-4, bfloat16 4e-3.
_COARSE = 1e-6


@dataclass
class Snapshot:
    """One parameter before the step. The gradient's part is filled by :meth:`see_gradient`, inside the step when a closure makes it.

    Attributes:
        keeps_gradient: whether what is measured needs the gradient itself, in the observation.
        has_spectra: whether those of the NS inputs are measured.
        copies: None where observations are made as soon as they are read; else what they are made of is copied.
        errors: what the adapter's readers raised; what they would have read is missing from the observation.
        wrapped: whether a wrapper may change the weights after the optimizer's step, so that no factor of that is the last thing done to them.
        tell_sparse: is told the name of a matrix whose gradient is sparse: it has no observation.
    """

    matrices: list[Matrix]  # the parameter's: one, or one per slice of a stack
    adapter: Adapter
    reading: Reading
    keeps_gradient: bool = False
    has_spectra: bool = True
    copies: Copies | None = None
    gradient_seen: bool = False
    gradient_copy: Tensor | None = None  # for a closure that is called again
    grad_rms: tuple[Callable[[], float], ...] = ()  # of every matrix
    errors: list[Exception] = field(default_factory=list)
    wrapped: bool = False
    tell_sparse: Callable[[str], None] = lambda name: None

    def see_gradient(self, grad_scale: Tensor | None = None) -> None:
        """Copy the gradient, and what the adapter reads before the step, before the optimizer touches either.

        `grad_scale` is what a GradScaler leaves to a fused optimizer to divide by within its step.
        """
        gradient = self.reading.parameter.grad
        if gradient is None:
            return
        if gradient.layout is not torch.strided:
            self.tell_sparse(self.matrices[0].name)
            return
        self.take_gradient(gradient.detach() if grad_scale is None else gradient.detach() / grad_scale, is_own=grad_scale is not None)

    def take_gradient(self, gradient: Tensor, *, is_own: bool) -> None:
        """Copy this gradient, unless nobody else has it (`is_own`), and what the adapter reads before the step."""
        self.gradient_seen = True
        if self.copies is not None:
            if not is_own:
                gradient = self.gradient_copy = self.copies.of(gradient, self.gradient_copy)
            else:
                self.copies.own(gradient)
            self.grad_rms = tuple(partial(tensor_rms, matrix.of(gradient)) for matrix in self.matrices)
        else:
            # Begun before the step, and looked at after it: an accelerator is not waited for.
            self.grad_rms = tuple(
                partial(rms_of_norm, tensor_norm(matrix.of(gradient)), matrix.rows * matrix.cols) for matrix in self.matrices
            )
        ns, before = self.adapter.orthogonalisation, self.adapter.before
        if self.keeps_gradient or ns is not None or before is not None or self._has_no_momentum():
            # A copy: some optimizers write into the gradient, or throw it away.
            self.reading.gradient = gradient.clone() if not is_own and self.copies is None else gradient
        if before is not None:
            self.reading.before = found = self._read(before)
            if self.copies is not None and isinstance(found, Tensor):
                self.copies.own(found, unless=[self.reading.parameter, *tensors_in(self.reading.state).values()])

    def read(self) -> list[tuple[Matrix, Callable[[], Observation]]]:
        """Read what an observation of every matrix after the step is made of; none where it had no gradient for the parameter or its shape changed."""
        self.reading.state = parameter_state(self.reading.optimizer, self.reading.parameter)
        return self.observations()

    def observations(self) -> list[tuple[Matrix, Callable[[], Observation]]]:
        """The same of a reading that is complete."""
        reading, parameter = self.reading, self.reading.parameter.detach()
        if not self.gradient_seen or parameter.shape != reading.weight.shape or any(not m.fits(parameter) for m in self.matrices):
            return []
        momentum = self._read_matrix("momentum", self.adapter.momentum)
        step = self._step(momentum)
        tensors = _Tensors(
            self._problem(momentum), step, self._state(momentum, step), *self._gradients(), self._read(self.adapter.rotation)
        )
        if self.copies is not None:
            tensors = tensors.copied(self.copies.after_step)
        side = SideStream(parameter.device)
        return [(matrix, partial(tensors.of, matrix, side)) for matrix in self.matrices]

    def _problem(self, momentum: Tensor | None) -> ProblemTensors | None:
        """What Newton–Schulz was given; where there is none, momentum or gradient."""
        ns = self.adapter.orthogonalisation
        if ns is None:
            given, settings = self.reading.gradient if momentum is None else momentum, None
        else:
            given, settings = self._read_matrix("ns_input", ns.ns_input), self._read(ns.settings)
        return None if given is None else ProblemTensors(given, settings, self.has_spectra)

    def _step(self, momentum: Tensor | None) -> StepTensors:
        reading, adapter, ns = self.reading, self.adapter, self.adapter.orthogonalisation
        parameter = reading.parameter.detach()
        is_coarse = unit_roundoff(parameter) > _COARSE

        def of_matrices(of: Callable[[Reading, int, int], float] | None) -> dict[Matrix, float]:
            return {m: math.nan if of is None else or_nan(self._read(partial(_of_shape, of, m))) for m in self.matrices}

        factor = None if self.wrapped else self._read(adapter.weight_factor)
        multiplied = factor is not None and bool((factor != 1).any())

        def least(matrix: Matrix) -> float:
            if factor is None or not multiplied:
                return math.nan if factor is None else 1.0
            return float(matrix.of(factor.expand_as(parameter)).min())

        return StepTensors(
            before=reading.weight,
            after=parameter / factor if factor is not None and multiplied else parameter,
            momentum=momentum,
            intended=self._read_matrix("intended", adapter.intended) if is_coarse else None,
            lr=or_nan(self._read(adapter.learning_rate)),
            weight_decay=number(reading.group.get("weight_decay", reading.group.get("wd", 0.0))),  # Moonlight, MARS-M: wd
            decoupled_decay=or_nan(self._read(adapter.decoupled_decay)),
            trust_ratio=or_nan(self._read(adapter.trust_ratio)),
            grad_rms=dict(zip(self.matrices, self.grad_rms, strict=True)),
            output_scale=of_matrices(None if ns is None else ns.output_scale),
            target_rms=of_matrices(None if ns is None else ns.target),
            weight_factor={m: least(m) for m in self.matrices},
            row_divisors=None if ns is None or ns.row_divisors is None else self._read(ns.row_divisors),
        )

    def _state(self, momentum: Tensor | None, step: StepTensors) -> OptimizerState | None:
        second = self._read(self.adapter.second_moment)
        if second is None:
            return None
        averages = self._read(self.adapter.averages) or Averages()
        kronecker, clipped = self._read(self.adapter.kronecker), self._read_matrix("clipped", self.adapter.clipped)
        return OptimizerState(second, momentum, averages, kronecker, clipped, step.weight_decay, step.decoupled_decay)

    def _gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradient, where something that is measured needs it, and what was averaged in its place."""
        corrected = self._read_matrix("correction", self.adapter.correction)
        return self.reading.gradient if self.keeps_gradient or corrected is not None else None, corrected

    def _has_no_momentum(self) -> bool:
        """Whether the spectrum may have to be the gradient's; before the step, so that a failure here may be none after it."""
        with KeptOut():
            return not self._is_matrix(self.adapter.momentum(self.reading))
        return True

    def _is_matrix(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.numel() == self.reading.parameter.numel()

    def _read_matrix(self, name: str, reader: Reader) -> Tensor | None:
        """What a reader gives that is to be a tensor like the parameter."""
        value = self._read(reader)
        shape = tuple(self.reading.parameter.shape)
        if value is None or self._is_matrix(value):
            return None if value is None else value.reshape(shape)
        came = f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        self.errors.append(ValueError(f"{name} of the adapter: expected a tensor of the parameter's shape {shape}, got {came}"))
        return None

    def _read(self, reader: "Callable[[Reading], T]") -> "T | None":
        """What a reader of the adapter gives; where it fails, only what it would have read is missing."""
        # Without its traceback, whose frames hold this snapshot and its copies.
        with KeptOut(lambda error: self.errors.append(error.with_traceback(None))):
            return reader(self.reading)
        return None


def _of_shape(of: Callable[[Reading, int, int], float], matrix: Matrix, reading: Reading) -> float:
    return of(reading, matrix.rows, matrix.cols)


@dataclass(frozen=True)
class _Tensors:
    """All that the observations of one parameter's matrices are made of."""

    problem: ProblemTensors | None
    step: StepTensors
    state: OptimizerState | None
    gradient: Tensor | None
    corrected: Tensor | None
    rotation: Sequence[Tensor] | None

    def copied(self, copy: Callable[[Tensor], Tensor]) -> "_Tensors":
        """The same of copies."""
        return _Tensors(
            None if self.problem is None else self.problem.copied(copy),
            self.step.copied(copy),
            None if self.state is None else self.state.copied(copy),
            None if self.gradient is None else copy(self.gradient),
            None if self.corrected is None else copy(self.corrected),
            None if self.rotation is None else [copy(tensor) for tensor in self.rotation],
        )

    def of(self, matrix: Matrix, side: SideStream) -> Observation:
        """The observation of one matrix."""
        with side.stream():
            gradient = None
            if self.gradient is not None:
                corrected = None if self.corrected is None else to_host(matrix.of(self.corrected))
                gradient = Gradient(to_host(matrix.of(self.gradient)), unit_roundoff(self.gradient), corrected)
            return Observation(
                problem=None if self.problem is None else self.problem.of(matrix),
                step=self.step.of(matrix),
                moments=None if self.state is None else self.state.of(matrix, to_host, tensor_mean),
                gradient=gradient,
                rotation=None if self.rotation is None else Rotation(*map(to_host, self.rotation)),
            )
