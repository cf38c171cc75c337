"""The record being filled: what was measured on each matrix at one step, until it goes to the writer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...diagnostics.catalogue import ROUNDED, SECOND_MOMENT_FORMS
from ...diagnostics.quantities.observation import (
    Measured,
    NewtonSchulz,
    Observation,
    measure_geometry,
    measure_second_moment,
    measure_second_moment_map,
    measure_update,
    part_of,
    side_by_side,
)
from ...diagnostics.quantities.on_request import measure_block, measure_gradient, measure_pair, measure_precision
from ...diagnostics.spectra.spectrum_sketch import rounded
from ..observing.matrices import Matrix
from .layout import Layout


class Record:
    """One record of all groups.

    Attributes:
        step: its step.
        waits_for: labels of the optimizers whose step is still to come.
        rows: its arrays by group, missing values where nothing was measured.
        row_of: matrix → row, by group.
        ns_schedules: the run's list of Newton–Schulz schedules, which `ns_schedule` holds indices into.
    """

    def __init__(self, step: int, layout: Layout, waits_for: set[str], ns_schedules: list[dict[str, Any]]) -> None:
        """New schedules are added to `ns_schedules`."""
        self.step = step
        self.waits_for = waits_for
        self.rows: dict[str, dict[str, NDArray[Any]]] = layout.empty_rows()
        self.row_of = layout.row_of
        self.ns_schedules = ns_schedules

    def measure(self, matrix: Matrix, seen: Observation) -> None:
        """Measure all groups of one parameter's matrix."""
        self.fill("update", matrix, measure_update(seen))
        if seen.moments is not None and "second_moment" in self.rows:
            form = SECOND_MOMENT_FORMS.index(seen.moments.form)
            self.fill("second_moment", matrix, {**measure_second_moment(seen), "second_moment_form": form})
        if seen.moments is not None and "second_moment_map" in self.rows:
            self.fill("second_moment_map", matrix, measure_second_moment_map(seen))

    def measure_spectra(self, matrix: Matrix, seen: Observation) -> None:
        """Measure the groups that are of Newton–Schulz problems: the geometry, and what was asked for beside it."""
        if self._has("geometry", matrix) and seen.ns_input is not None:
            measured = measure_geometry(seen)
            if seen.newton_schulz is not None:
                measured["ns_schedule"] = self._ns_schedule(seen.newton_schulz)
            self.fill("geometry", matrix, measured)
        for group, measure in (("gradient", measure_gradient), ("precision", measure_precision)):
            if self._has(group, matrix):
                self.fill(group, matrix, measure(seen))

    def measure_composite(self, matrix: Matrix, seen: Sequence[Observation]) -> None:
        """Measure what is made of the matrices that were `seen`: a stack, a block or a pair."""
        match matrix.kind:
            case "stack":
                self.measure_spectra(matrix, side_by_side(seen))
            case "block" if matrix.block is not None:
                self.fill("blocks", matrix, measure_block(part_of(seen[0], matrix.block.axis, matrix.block.outputs)))
            case "pair":
                self.fill("stacking", matrix, measure_pair(*seen))

    def _has(self, group: str, matrix: Matrix) -> bool:
        return group in self.rows and matrix in self.row_of[group]

    def fill(self, group: str, matrix: Matrix, measured: Measured) -> None:
        """Set values of one matrix, if the group is recorded and has the matrix."""
        if not self._has(group, matrix):
            return
        row = self.row_of[group][matrix]
        with np.errstate(over="ignore"):  # what does not fit into float32 is inf, which is data
            for name, value in measured.items():
                self.rows[group][name][row] = rounded(value) if name in ROUNDED else value

    def _ns_schedule(self, newton_schulz: NewtonSchulz) -> int:
        """Index of the schedule in the run's list, added when new."""
        entry: dict[str, Any] = {"coefficients": [list(triple) for triple in newton_schulz.coefficients], "eps": newton_schulz.eps}
        if newton_schulz.scaling != "frobenius":  # what an entry without it means
            entry["scaling"] = newton_schulz.scaling
        if entry not in self.ns_schedules:
            self.ns_schedules.append(entry)
        return self.ns_schedules.index(entry)
