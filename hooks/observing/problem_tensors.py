"""What is orthogonalised of one parameter, or would be, as tensors: the problems of its matrices."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ...diagnostics.quantities.problem import NewtonSchulz, Problem
from .accelerator import gram_of, to_host
from .matrix import Matrix
from .tensor_sizes import unit_roundoff


@dataclass(frozen=True)
class ProblemTensors:
    """The NS input of a parameter, or its momentum or gradient where the optimizer does not orthogonalise.

    No step is needed for one: a checkpoint has it, and so have pieces of a parameter once they are gathered.

    Attributes:
        input: of the parameter's shape.
        newton_schulz: None where the optimizer does not orthogonalise.
        has_spectra: whether spectra of it are measured; then an accelerator that holds it makes the Gram matrices.
    """

    input: Tensor
    newton_schulz: NewtonSchulz | None
    has_spectra: bool = True

    def copied(self, copy: Callable[[Tensor], Tensor]) -> "ProblemTensors":
        """The same of a copy."""
        return replace(self, input=copy(self.input))

    def of(self, matrix: Matrix) -> Problem:
        """That of one matrix."""
        own = matrix.of(self.input)
        gram = gram_of(own) if self.has_spectra and matrix.geometry else None
        return Problem(to_host(own), unit_roundoff(own), gram, self.newton_schulz)
