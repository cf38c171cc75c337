"""How a run is laid out: its groups, arrays and coordinates, from the catalogue and the matrices."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..diagnostics.catalogue import EXTRA_DIMENSIONS, Quantity, in_group
from .matrices import Matrix, coordinates, quantile_levels
from .writer import Writer


def lay_out(writer: Writer, rows: Mapping[str, Sequence[Matrix]]) -> None:
    """Create the groups of a new run and commit them, or make sure that an existing one describes the same matrices.

    Raises:
        ValueError: the run holds other matrices.
    """
    for group, matrices in rows.items():
        along_matrix = coordinates(matrices)
        if writer.has(group):
            if any(writer.coordinate(group, key) != along_matrix[key].tolist() for key in ("name", "rows", "cols", "optimizer")):
                raise ValueError(f"store: {writer.path} holds a run of other matrices; record to another path")
            continue
        if group == "geometry":
            along_matrix["quantile_level"] = quantile_levels(matrices)
        writer.create_group(group, along_matrix, {"ns_schedules": []} if group == "geometry" else {})
        for quantity in in_group(group):
            texts = {"long_name": quantity.long_name, "units": quantity.units, "definition": quantity.definition}
            dimensions = ("matrix",) if quantity.extra is None else ("matrix", quantity.extra)
            writer.create_array(group, quantity.name, _shape(quantity, len(matrices)), dimensions, quantity.dtype, texts, quantity.missing)
    if not writer.has("scalars"):
        writer.create_group("scalars", {}, {})
    writer.flush()


def empty_rows(group: str, matrices: int) -> dict[str, NDArray[Any]]:
    """One record of a group with everything missing."""
    return {q.name: np.full(_shape(q, matrices), q.missing, dtype=q.dtype) for q in in_group(group)}


def _shape(quantity: Quantity, matrices: int) -> tuple[int, ...]:
    return (matrices,) if quantity.extra is None else (matrices, EXTRA_DIMENSIONS[quantity.extra])
