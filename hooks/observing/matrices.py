"""Which parameters are recorded, and under which names."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ...diagnostics.escape import storable
from ...diagnostics.operators import OperatorRule, classify, clean_name, expert_index, layer_indices
from ...diagnostics.quantities.adam_mini import UNKNOWN_HEADS, Heads
from ...diagnostics.spectra.spectrum_sketch import sketch_levels
from .heads import find_heads, heads_of
from .left_out import left_out
from .matrix import NO_GEOMETRY, Matrix
from .watched import Watched


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


def find_matrices(watched: Iterable[Watched], names: Names) -> list[Matrix]:
    """The matrices of every dense floating-point parameter with two or more dimensions, in the optimizers' order; each parameter once.

    What else has two or more dimensions is told of, once per optimizer and kind.
    """
    name_of, kernels = names.look_up()
    heads = names.heads()
    layer_of = layer_indices(name_of.values())
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
                if (kind := left_out(p, name)) is not None:
                    others.setdefault(kind, []).append(name)
                    continue
                operator = storable(classify(name, names.rule))
                geometry = (ns is not None or operator not in NO_GEOMETRY) and id(p) not in stacked_ids
                whole = Matrix(
                    p, one.label, name, operator, layer_of.get(name, -1), p.shape[0], p.numel() // p.shape[0], geometry,
                    heads=heads_of(operator, heads(p)), expert=expert_index(name),
                )  # fmt: skip
                is_stack = p.ndim == 3 and id(p) not in kernels and operator != "conv" and (ns is None or ns.batched)
                found[id(p)] = _slices(whole) if is_stack else [whole]
        one.tell_left_out(others)
    return [m for matrices in found.values() for m in matrices]


def _slices(stack: Matrix) -> list[Matrix]:
    """The matrices of a three-dimensional parameter, as experts keep them."""
    count, rows, cols = stack.parameter.shape
    names = [f"{stack.name}[{i}]" if count > 1 else stack.name for i in range(count)]
    return [replace(stack, name=name, rows=rows, cols=cols, index=i, expert=expert_index(name)) for i, name in enumerate(names)]


def coordinates(matrices: Sequence[Matrix]) -> dict[str, NDArray[Any]]:
    """Coordinates along `matrix`; heads are 0 where they are not known, or there are none. Text as NumPy's variable-width strings, which Zarr stores without a warning."""
    text = np.dtypes.StringDType()
    return {
        "name": np.array([m.name for m in matrices], dtype=text),
        "operator": np.array([m.operator for m in matrices], dtype=text),
        "layer": np.array([m.layer for m in matrices], dtype="int32"),
        "expert": np.array([m.expert for m in matrices], dtype="int32"),
        "rows": np.array([m.rows for m in matrices], dtype="int64"),
        "cols": np.array([m.cols for m in matrices], dtype="int64"),
        "optimizer": np.array([m.optimizer for m in matrices], dtype=text),
        "query_heads": np.array([m.heads[0] for m in matrices], dtype="int32"),
        "kv_heads": np.array([m.heads[1] for m in matrices], dtype="int32"),
    }


def quantile_levels(matrices: Sequence[Matrix]) -> NDArray[np.float64]:
    """Levels of the stored singular values, shape (matrix, quantile): they depend on the rank."""
    return np.stack([sketch_levels(min(m.rows, m.cols)) for m in matrices])
