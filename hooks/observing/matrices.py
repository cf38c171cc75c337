"""Which parameters are recorded, and under which names."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...diagnostics.escape import storable
from ...diagnostics.operators import OperatorRule, classify, clean_name, layer_index
from ...diagnostics.quantities.adam_mini import UNKNOWN_HEADS, Heads
from ...diagnostics.quantities.attention_blocks import Block
from ...diagnostics.spectra.spectrum_sketch import sketch_levels
from .heads import find_heads, heads_of

if TYPE_CHECKING:
    from .watched import Watched

# Wide token tables: their spectrum costs more than all hidden matrices together and no optimizer here orthogonalises them.
NO_GEOMETRY = frozenset({"embed", "head"})


# What keeps parameters with two or more dimensions from being recorded, and why.
LEFT_OUT = {
    "complex": "what is measured here is of real numbers; keep real and imaginary parts in parameters of their own to have them recorded",
    "integer or quantised": "there is no gradient in such a format",
    "8-bit floating-point": "torch computes nothing in such a format; attach to the optimizer of the master weights",
    "sparse or packed": "what is measured here is of dense arrays",
}


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
    members: "tuple[Matrix, ...]" = ()  # the matrices of parameters that it is made of, or a part of; none where it is one itself
    block: Block | None = None  # which part of its one member
    heads: Heads = UNKNOWN_HEADS  # of its attention layer, where it is a projection of one: of queries, of keys and values

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


class Names:
    """What a model calls its parameters, and which of them belong to a convolution."""

    def __init__(self, model: nn.Module | None, rule: OperatorRule | None, heads: Heads | None = None) -> None:
        self.model, self.rule, self._heads = model, rule, heads

    def look_up(self) -> tuple[dict[int, str], set[int]]:
        """Names by `id` of the parameter, and the ids of convolutions' weights. Looked up anew: models change."""
        if self.model is None:
            return {}, set()
        raw = {id(p): storable(name) for name, p in self.model.named_parameters()}
        count = Counter(map(clean_name, raw.values()))
        # A part of a name that a wrapper would have added may be the model's own.
        names = {key: clean_name(name) if count[clean_name(name)] == 1 else name for key, name in raw.items()}
        kernels = {id(p) for m in self.model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters(recurse=False)}
        return names, kernels

    def heads(self) -> Callable[[nn.Parameter], Heads]:
        """A function of the parameter: the heads that were given, else those that the model tells."""
        found = find_heads(self.model) if self._heads is None else {}
        return lambda parameter: found.get(id(parameter), self._heads or UNKNOWN_HEADS)


def left_out(parameter: Tensor) -> str | None:
    """What keeps a parameter with two or more dimensions from being recorded, a key of `LEFT_OUT`; None where nothing does."""
    if parameter.layout is not torch.strided:
        return "sparse or packed"
    if parameter.is_complex():
        return "complex"
    if not parameter.is_floating_point():
        return "integer or quantised"
    return "8-bit floating-point" if parameter.element_size() < 2 else None


def find_matrices(watched: "Iterable[Watched]", names: Names) -> list[Matrix]:
    """The matrices of every dense floating-point parameter with two or more dimensions, in the optimizers' order; each parameter once.

    What else has two or more dimensions is told of, once per optimizer and kind.

    Raises:
        ValueError: a parameter is sharded.
    """
    name_of, kernels = names.look_up()
    heads = names.heads()
    found: dict[int, list[Matrix]] = {}
    for one in watched:
        others: dict[str, list[str]] = {}
        for g, group in enumerate(one.optimizer.param_groups):
            adapter = one.adapter(group)
            ns = adapter.orthogonalisation
            stacked_ids = {id(p) for stack in one.stacks(group) for p in stack}
            for i, p in enumerate(group["params"]):
                if p.ndim < 2 or not p.numel() or id(p) in found:
                    continue
                name = name_of.get(id(p), f"{one.label}.group{g}.param{i}")
                if (kind := left_out(p)) is not None:
                    others.setdefault(kind, []).append(name)
                    continue
                if hasattr(p, "full_tensor"):
                    raise ValueError(
                        f"optimizers: {name} is a sharded DTensor, which cannot be recorded yet; attach before sharding is applied, or without it"
                    )
                operator = storable(classify(name, names.rule))
                geometry = (ns is not None or operator not in NO_GEOMETRY) and id(p) not in stacked_ids
                whole = Matrix(
                    p, one.label, name, operator, layer_index(name), p.shape[0], p.numel() // p.shape[0], geometry,
                    heads=heads_of(operator, heads(p)),
                )  # fmt: skip
                is_stack = p.ndim == 3 and id(p) not in kernels and operator != "conv" and (ns is None or ns.batched)
                found[id(p)] = _slices(whole) if is_stack else [whole]
        one.tell_left_out(others)
    return [m for matrices in found.values() for m in matrices]


def _slices(stack: Matrix) -> list[Matrix]:
    """The matrices of a three-dimensional parameter, as experts keep them."""
    count, rows, cols = stack.parameter.shape
    return [replace(stack, name=f"{stack.name}[{i}]" if count > 1 else stack.name, rows=rows, cols=cols, index=i) for i in range(count)]


def coordinates(matrices: Sequence[Matrix]) -> dict[str, NDArray[Any]]:
    """Coordinates along `matrix`; heads are 0 where they are not known, or there are none. Text as NumPy's variable-width strings, which Zarr stores without a warning."""
    text = np.dtypes.StringDType()
    return {
        "name": np.array([m.name for m in matrices], dtype=text),
        "operator": np.array([m.operator for m in matrices], dtype=text),
        "layer": np.array([m.layer for m in matrices], dtype="int32"),
        "rows": np.array([m.rows for m in matrices], dtype="int64"),
        "cols": np.array([m.cols for m in matrices], dtype="int64"),
        "optimizer": np.array([m.optimizer for m in matrices], dtype=text),
        "query_heads": np.array([m.heads[0] for m in matrices], dtype="int32"),
        "kv_heads": np.array([m.heads[1] for m in matrices], dtype="int32"),
    }


def quantile_levels(matrices: Sequence[Matrix]) -> NDArray[np.float64]:
    """Levels of the stored singular values, shape (matrix, quantile): they depend on the rank."""
    return np.stack([sketch_levels(min(m.rows, m.cols)) for m in matrices])
