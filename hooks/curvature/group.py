"""The group `curvature` of a run: there from the first call on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...diagnostics.catalogue import ROUNDED
from ...diagnostics.spectra.spectrum_sketch import rounded
from ..observing.matrix import Matrix
from ..recording.layout import Layout


class CurvatureGroup:
    """The group `curvature` of a run, made when it is first needed.

    Attributes:
        has_second_backward: what method="auto" goes by.
        told_of_pieces: whether it was told that matrices in pieces are not measured.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.told_of_pieces = False
        self.has_second_backward = True  # until it is seen to lack one

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
                    rows[name][row_of[matrix]] = rounded(value) if name in ROUNDED else value
        return rows
