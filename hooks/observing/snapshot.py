"""Reading one parameter around an optimizer step: what the step will overwrite, then one observation per matrix."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...diagnostics.quantities.observation import Observation
from ...diagnostics.quantities.rotation import Rotation
from ..adapters import Adapter, Averages, Reader, Reading, number, state_of
from ..adapters.names import tensors_in
from ..recording.guarding import raised_by_signal_handler
from .accelerator import SideStream, gram_of, to_host
from .copies import Copies
from .matrices import Matrix
from .optimizer_state import OptimizerState

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
        gradient = gradient.detach() if grad_scale is None else gradient.detach() / grad_scale
        self.gradient_seen = True
        if self.copies is not None:
            if grad_scale is None:
                gradient = self.gradient_copy = self.copies.of(gradient, self.gradient_copy)
            else:
                self.copies.own(gradient)
            self.grad_rms = tuple(partial(tensor_rms, matrix.of(gradient)) for matrix in self.matrices)
        else:
            # Begun before the step, and looked at behind it: an accelerator is not waited for.
            self.grad_rms = tuple(
                partial(rms_of_norm, tensor_norm(matrix.of(gradient)), matrix.rows * matrix.cols) for matrix in self.matrices
            )
        ns, before = self.adapter.orthogonalisation, self.adapter.before
        if self.keeps_gradient or ns is not None or before is not None or self._has_no_momentum():
            # A copy: some optimizers write into the gradient, or throw it away.
            self.reading.gradient = gradient.clone() if grad_scale is None and self.copies is None else gradient
        if before is not None:
            self.reading.before = found = self._read(before)
            if self.copies is not None and isinstance(found, Tensor):
                self.copies.own(found, unless=[self.reading.parameter, *tensors_in(self.reading.state).values()])

    def read(self) -> list[tuple[Matrix, Callable[[], Observation]]]:
        """Read what an observation of every matrix after the step is made of; none where it had no gradient for the parameter or its shape changed."""
        reading, adapter, parameter = self.reading, self.adapter, self.reading.parameter.detach()
        if not self.gradient_seen or parameter.shape != reading.weight.shape or any(not m.fits(parameter) for m in self.matrices):
            return []
        reading.state = state_of(reading.optimizer, reading.parameter)
        momentum = self._read_matrix("momentum", adapter.momentum)
        second_moment = self._read(adapter.second_moment)
        coarse = unit_roundoff(parameter) > _COARSE
        intended = self._read_matrix("intended", adapter.intended) if coarse else None
        ns = adapter.orthogonalisation
        if ns is None:
            spectrum_input = reading.gradient if momentum is None else momentum
            newton_schulz = None
        else:
            spectrum_input = self._read_matrix("ns_input", ns.ns_input)
            newton_schulz = self._read(ns.settings)
        corrected = self._read_matrix("correction", adapter.correction)
        rotation = self._read(adapter.rotation)
        trust_ratio = self._read(adapter.trust_ratio)
        gradient = reading.gradient if self.keeps_gradient or corrected is not None else None
        lr = self._read(adapter.learning_rate)
        weight_decay = number(reading.group.get("weight_decay", reading.group.get("wd", 0.0)))  # Moonlight, MARS-M: wd
        decay = self._read(adapter.decoupled_decay)
        kept = None
        if second_moment is not None:
            averages = self._read(adapter.averages) or Averages()
            kronecker, clipped = self._read(adapter.kronecker), self._read_matrix("clipped", adapter.clipped)
            kept = OptimizerState(second_moment, momentum, averages, kronecker, clipped, weight_decay, or_nan(decay))
        if self.copies is not None:
            copied = self.copies.after_step
            parameter = copied(parameter)
            momentum, spectrum_input, intended, gradient, corrected = (
                None if tensor is None else copied(tensor) for tensor in (momentum, spectrum_input, intended, gradient, corrected)
            )
            rotation = None if rotation is None else [copied(tensor) for tensor in rotation]
            kept = None if kept is None else kept.copied(copied)
        weight, has_spectra, beside = reading.weight, self.has_spectra, SideStream(parameter.device)

        def observation(matrix: Matrix, grad_rms: Callable[[], float], output_scale: float | None, target: float | None) -> Observation:
            with beside.stream():
                return observed(matrix, grad_rms, output_scale, target)

        def observed(matrix: Matrix, grad_rms: Callable[[], float], output_scale: float | None, target: float | None) -> Observation:
            seen_by_ns = None if spectrum_input is None else matrix.of(spectrum_input)
            return Observation(
                weight_before=to_host(matrix.of(weight)),
                weight_after=to_host(matrix.of(parameter)),
                weight_roundoff=unit_roundoff(parameter),
                grad_rms=grad_rms(),
                momentum_rms=math.nan if momentum is None else tensor_rms(matrix.of(momentum)),
                lr=or_nan(lr),
                weight_decay=weight_decay,
                decoupled_decay=or_nan(decay),
                ns_input=None if seen_by_ns is None else to_host(seen_by_ns),
                ns_roundoff=0.0 if seen_by_ns is None else unit_roundoff(seen_by_ns),
                gram=gram_of(seen_by_ns) if seen_by_ns is not None and has_spectra and matrix.geometry else None,
                newton_schulz=newton_schulz,
                output_scale=or_nan(output_scale),
                target_rms=or_nan(target),
                moments=None if kept is None else kept.of(matrix, to_host, tensor_mean),
                intended_rms=math.nan if intended is None else tensor_rms(matrix.of(intended)),
                trust_ratio=or_nan(trust_ratio),
                gradient=None if gradient is None else to_host(matrix.of(gradient)),
                gradient_roundoff=0.0 if gradient is None else unit_roundoff(gradient),
                corrected=None if corrected is None else to_host(matrix.of(corrected)),
                rotation=None if rotation is None else Rotation(*map(to_host, rotation)),
            )

        def scale(of: Callable[[Reading, int, int], float], matrix: Matrix) -> float | None:
            return self._read(lambda reading: of(reading, matrix.rows, matrix.cols))

        scales = [(None, None) if ns is None else (scale(ns.output_scale, m), scale(ns.target, m)) for m in self.matrices]
        return [
            (matrix, partial(observation, matrix, grad_rms, *scale))
            for matrix, grad_rms, scale in zip(self.matrices, self.grad_rms, scales, strict=True)
        ]

    def _has_no_momentum(self) -> bool:
        """Whether the spectrum may have to be the gradient's; before the step, so that a failure here may be none after it."""
        try:
            return not self._is_matrix(self.adapter.momentum(self.reading))
        except Exception as error:
            if raised_by_signal_handler(error):
                raise
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
        try:
            return reader(self.reading)
        except Exception as error:
            if raised_by_signal_handler(error):
                raise
            # Without its traceback, whose frames hold this snapshot and its copies.
            self.errors.append(error.with_traceback(None))
            return None


def or_nan(value: float | None) -> float:
    """The number, NaN where there is none."""
    return math.nan if value is None else value


def tensor_rms(tensor: Tensor) -> float:
    """RMS of a tensor, summed in float64 where the tensor is."""
    return rms_of_norm(tensor_norm(tensor), tensor.numel())


def tensor_norm(tensor: Tensor) -> Tensor:
    """‖A‖_F, summed in float64 where the tensor is.

    Not NumPy's: its threads and torch's spin for each other's cores when calls alternate (a record took three times as long). Nor
    torch._foreach_norm: in float64 it takes 3 to 17 % less for 28 matrices (16 to 512 wide), 0.2 % of a record.
    """
    norm: Tensor = torch.linalg.vector_norm(_with_float64(tensor), dtype=torch.float64)
    return norm


def rms_of_norm(norm: Tensor, count: int) -> float:
    """‖A‖_F/√(mn)."""
    return float(norm) / math.sqrt(max(count, 1))


def tensor_mean(tensor: Tensor) -> float:
    """Mean of a tensor, summed in float64 where the tensor is."""
    return float(_with_float64(tensor).mean(dtype=torch.float64))


def _with_float64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()  # Metal has no float64


def unit_roundoff(tensor: Tensor) -> float:
    """Half the distance from 1 to the next number of the tensor's format: 2⁻²⁴ for float32, 2⁻⁸ for bfloat16."""
    return float(torch.finfo(tensor.dtype).eps) / 2
