"""Reading one matrix around an optimizer step: what the step will overwrite, then the observation."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..diagnostics.observation import NewtonSchulz, Observation
from .adapters import Adapter, Group, State, number
from .matrices import Matrix


@dataclass
class Snapshot:
    """One matrix before the step. The gradient's part is filled by :meth:`see_gradient`, inside the step when a closure makes it."""

    matrix: Matrix
    group: Group
    adapter: Adapter
    weight: Tensor
    lr: float
    gradient_seen: bool = False
    grad_rms: float = float("nan")
    gradient: Tensor | None = None  # a copy, where it may be what the spectrum is of: some optimizers write into theirs
    ns_input: Tensor | None = None
    newton_schulz: NewtonSchulz | None = None

    def see_gradient(self, state: State, grad_scale: Tensor | None = None) -> None:
        """Read the gradient, and build the NS input from it, before the optimizer touches either.

        `grad_scale` is what a GradScaler leaves to a fused optimizer to divide by within its step.
        """
        gradient = self.matrix.parameter.grad
        if gradient is None or gradient.is_sparse:
            return
        gradient = gradient.detach() if grad_scale is None else gradient.detach() / grad_scale
        self.gradient_seen = True
        self.grad_rms = tensor_rms(gradient)
        ns = self.adapter.orthogonalisation
        if ns is not None:
            self.ns_input = ns.ns_input(gradient, state, self.group)
            self.newton_schulz = ns.settings(self.group)
        elif self.matrix.geometry and self.adapter.momentum(state) is None:
            self.gradient = gradient.clone()

    def observe(self, state: State) -> Observation | None:
        """The observation after the step; None where the step had no gradient for this matrix or its shape changed."""
        parameter, matrix = self.matrix.parameter, self.matrix
        as_attached = parameter.shape[:1] == (matrix.rows,) and parameter.numel() == matrix.rows * matrix.cols
        if not (self.gradient_seen and as_attached and parameter.shape == self.weight.shape):
            return None
        momentum = self.adapter.momentum(state)
        spectrum_input = self.ns_input
        if spectrum_input is None and self.adapter.orthogonalisation is None and matrix.geometry:
            spectrum_input = momentum if momentum is not None else self.gradient
        ns = self.adapter.orthogonalisation
        shape = (matrix.rows, matrix.cols)
        return Observation(
            weight_before=as_array(self.weight).reshape(shape),
            weight_after=as_array(parameter).reshape(shape),
            weight_roundoff=unit_roundoff(parameter),
            grad_rms=self.grad_rms,
            momentum_rms=float("nan") if momentum is None else tensor_rms(momentum),
            lr=self.lr,
            weight_decay=number(self.group.get("weight_decay", 0.0)),
            decoupled_decay=self.adapter.decoupled_decay(self.group),
            ns_input=None if spectrum_input is None else as_array(spectrum_input).reshape(shape),
            ns_roundoff=0.0 if spectrum_input is None else unit_roundoff(spectrum_input),
            newton_schulz=self.newton_schulz,
            output_scale=ns.output_scale(self.group, *shape) if ns else float("nan"),
        )


def take_snapshot(matrix: Matrix, group: Group, adapter: Adapter) -> Snapshot:
    """Copy what the step will overwrite."""
    return Snapshot(matrix, group, adapter, matrix.parameter.detach().clone(), number(group.get("lr")))


def as_array(tensor: Tensor) -> NDArray[np.floating[Any]]:
    """The tensor's numbers on the CPU, without copying where it can; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach().cpu()
    array: NDArray[np.floating[Any]] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def tensor_rms(tensor: Tensor) -> float:
    """RMS of a tensor, summed in float64 where the tensor is.

    Not NumPy's: its threads and torch's spin for each other's cores when calls alternate (a record took three times as long).
    """
    tensor = tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()  # Metal has no float64
    norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return float(norm) / math.sqrt(max(tensor.numel(), 1))


def unit_roundoff(tensor: Tensor) -> float:
    """Half the distance from 1 to the next number of the tensor's format: 2⁻²⁴ for float32, 2⁻⁸ for bfloat16."""
    return float(torch.finfo(tensor.dtype).eps) / 2
