"""One row of a run: which part of which parameter it is."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from ...diagnostics.quantities.adam_mini import UNKNOWN_HEADS, Heads
from ...diagnostics.quantities.attention_blocks import Block

# Wide token tables: their spectrum costs more than all hidden matrices together and no optimizer here orthogonalises them.
NO_GEOMETRY = frozenset({"embed", "head"})


# A parameter's own, or a slice of it; several, side by side, that are orthogonalised as one; rows (or columns) of one; two of neighbouring layers.
Kind: TypeAlias = Literal["matrix", "stack", "block", "pair"]


@dataclass(frozen=True, eq=False)
class Matrix:
    """One row of the store: a parameter's matrix, a slice of a stack of them, or what is made of such matrices (`kind`).

    More than two dimensions are seen as (first, product of the rest), unless the first one counts matrices (`index`).
    """

    parameter: nn.Parameter
    optimizer: str  # label of its optimizer
    name: str
    operator: str
    layer: int
    rows: int
    cols: int
    geometry: bool
    index: int | None = None  # which slice of the parameter, where that is a stack of matrices (experts)
    kind: Kind = "matrix"
    expert: int = -1  # of a mixture, by its name
    members: "tuple[Matrix, ...]" = ()  # the matrices of parameters that it is made of, or a part of; none where it is one itself
    block: Block | None = None  # which part of its one member
    heads: Heads = UNKNOWN_HEADS  # of its attention layer, where it is a projection of one: of queries, of keys and values

    @property
    def parameter_name(self) -> str:
        """Of the parameter that it is, or is a slice of."""
        return self.name if self.index is None else self.name.removesuffix(f"[{self.index}]")

    def fits(self, parameter: Tensor) -> bool:
        """Whether the parameter still has the shape it had when recording began."""
        if self.index is not None:
            return parameter.ndim == 3 and parameter.shape[1:] == (self.rows, self.cols) and self.index < parameter.shape[0]
        return parameter.shape[:1] == (self.rows,) and parameter.numel() == self.rows * self.cols

    def of(self, tensor: Tensor) -> Tensor:
        """This matrix of a tensor that has the parameter's shape, or one with one number or row per slice."""
        if self.index is not None and tensor.ndim and tensor.shape[0] == self.parameter.shape[0]:
            tensor = tensor[self.index]
        return tensor.reshape(self.rows, self.cols) if tensor.numel() == self.rows * self.cols else tensor
