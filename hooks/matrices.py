"""Which parameters are recorded, and under which names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from ..diagnostics.operators import OperatorRule, classify, clean_name, layer_index
from ..diagnostics.spectrum_sketch import sketch_levels
from .adapters import adapter_for

# Wide token tables: their spectrum costs more than all hidden matrices together and no optimizer here orthogonalises them.
_NO_GEOMETRY = frozenset({"embed", "head"})


@dataclass(frozen=True, eq=False)
class Matrix:
    """One recorded parameter; more than two dimensions are seen as (first, product of the rest)."""

    parameter: nn.Parameter
    optimizer: str  # label of its optimizer
    name: str
    operator: str
    layer: int
    rows: int
    cols: int
    geometry: bool


def label_optimizers(optimizers: Sequence[Optimizer]) -> dict[str, Optimizer]:
    """Optimizers by class name, numbered where a class occurs twice: `Muon`, `AdamW`, `AdamW#2`."""
    labelled: dict[str, Optimizer] = {}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        taken = sum(label.split("#")[0] == name for label in labelled)
        labelled[f"{name}#{taken + 1}" if taken else name] = optimizer
    return labelled


def find_matrices(optimizers: Mapping[str, Optimizer], model: nn.Module | None, rule: OperatorRule | None) -> list[Matrix]:
    """Every real parameter with two or more dimensions, in the optimizers' order; each parameter once.

    Raises:
        ValueError: a parameter is sharded.
    """
    names = {} if model is None else {id(p): clean_name(name) for name, p in model.named_parameters()}
    found: dict[int, Matrix] = {}
    for label, optimizer in optimizers.items():
        adapter = adapter_for(optimizer)
        for g, group in enumerate(optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                if parameter.ndim >= 2 and parameter.numel() and parameter.is_floating_point() and id(parameter) not in found:
                    name = names.get(id(parameter), f"{label}.group{g}.param{i}")
                    if hasattr(parameter, "full_tensor"):
                        raise ValueError(
                            f"optimizers: {name} is a sharded DTensor, which cannot be recorded yet; attach before sharding is applied, or without it"
                        )
                    operator = classify(name, rule)
                    geometry = adapter.orthogonalisation is not None or operator not in _NO_GEOMETRY
                    rows, cols = parameter.shape[0], parameter.numel() // parameter.shape[0]
                    found[id(parameter)] = Matrix(parameter, label, name, operator, layer_index(name), rows, cols, geometry)
    return list(found.values())


def coordinates(matrices: Sequence[Matrix]) -> dict[str, NDArray[Any]]:
    """Coordinates along `matrix`. Text as NumPy's variable-width strings, which Zarr stores without a warning."""
    text = np.dtypes.StringDType()
    return {
        "name": np.array([m.name for m in matrices], dtype=text),
        "operator": np.array([m.operator for m in matrices], dtype=text),
        "layer": np.array([m.layer for m in matrices], dtype="int32"),
        "rows": np.array([m.rows for m in matrices], dtype="int64"),
        "cols": np.array([m.cols for m in matrices], dtype="int64"),
        "optimizer": np.array([m.optimizer for m in matrices], dtype=text),
    }


def quantile_levels(matrices: Sequence[Matrix]) -> NDArray[np.float64]:
    """Levels of the stored singular values, shape (matrix, quantile): they depend on the rank."""
    return np.stack([sketch_levels(min(m.rows, m.cols)) for m in matrices])
