"""The group `curvature` of a run: there from the first call on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ...diagnostics.catalogue import HESSIAN_METHODS
from ..layout import Layout
from ..matrices import Matrix
from ..writer import Writer
from .hessian_products import Loss, has_second_backward


class CurvatureGroup:
    """The group `curvature` of a run, made when it is first needed."""

    def __init__(self, writer: Writer) -> None:
        self._layout = Layout(writer, ["curvature"])
        self._second_backward: bool | None = None  # not known yet

    def method(self, asked: str, loss: Loss, parameters: list[nn.Parameter]) -> str:
        """One of `HESSIAN_METHODS`; "auto" is tried out once."""
        if asked == "auto" and self._second_backward is None:
            self._second_backward = has_second_backward(loss, parameters)
        return asked if asked != "auto" else HESSIAN_METHODS[0 if self._second_backward else 1]

    def include(self, matrices: Sequence[Matrix]) -> None:
        """Give new matrices their rows, and forget those that are gone."""
        self._layout.keep(matrices)
        known = self._layout.row_of["curvature"]
        if any(not m.members and m not in known for m in matrices):
            self._layout.include(matrices)

    def rows(self, matrices: Sequence[Matrix], found: Mapping[Matrix, Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
        """What was found, in the rows of the store; only quantities that were measured, so that calls at one step add up."""
        self.include(matrices)
        row_of, names = self._layout.row_of["curvature"], {name for values in found.values() for name in values}
        rows = {name: row for name, row in self._layout.empty_rows()["curvature"].items() if name in names}
        with np.errstate(over="ignore"):  # what does not fit into float32 is inf, which is data
            for matrix, values in found.items():
                for name, value in values.items():
                    rows[name][row_of[matrix]] = value
        return rows
