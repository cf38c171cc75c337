"""One record: what is read around each optimizer's step, what is measured on it, and the rows that go to the writer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...diagnostics.catalogue import ROUNDED, SECOND_MOMENT_FORMS
from ...diagnostics.quantities.measured import Measured
from ...diagnostics.quantities.moments import measure_second_moment, measure_second_moment_map
from ...diagnostics.quantities.observation import Observation, measure_correction, measure_geometry, side_by_side
from ...diagnostics.quantities.on_request import measure_block, measure_gradient, measure_pair, measure_precision
from ...diagnostics.quantities.problem import NewtonSchulz
from ...diagnostics.quantities.step_taken import measure_update
from ...diagnostics.spectra.spectrum_sketch import rounded
from ..observing.copies import Copies
from ..observing.fingerprints import Fingerprints
from ..observing.matrix import Matrix
from ..observing.piece_snapshot import PieceSnapshot
from ..observing.snapshot import Snapshot
from .fork_safe import fork_safe
from .journal import Journal
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
        """Measure all groups of one parameter's matrix, as far as what they need was seen."""
        if seen.step is not None:
            self.fill("update", matrix, measure_update(seen.step))
        if seen.gradient is not None:
            self.fill("update", matrix, measure_correction(seen.gradient))
        if seen.moments is not None and "second_moment" in self.rows:
            form = SECOND_MOMENT_FORMS.index(seen.moments.form)
            self.fill("second_moment", matrix, {**measure_second_moment(seen.moments), "second_moment_form": form})
        if seen.moments is not None and "second_moment_map" in self.rows:
            self.fill("second_moment_map", matrix, measure_second_moment_map(seen.moments))

    def measure_spectra(self, matrix: Matrix, seen: Observation) -> None:
        """Measure the groups that are of Newton–Schulz problems: the geometry, and what was asked for beside it."""
        if self._has("geometry", matrix) and seen.problem is not None:
            measured = measure_geometry(seen)
            if seen.problem.newton_schulz is not None:
                measured["ns_schedule"] = self._ns_schedule(seen.problem.newton_schulz)
            self.fill("geometry", matrix, measured)
        if self._has("gradient", matrix) and seen.gradient is not None:
            self.fill("gradient", matrix, measure_gradient(seen.gradient, seen.problem))
        if self._has("precision", matrix) and seen.problem is not None:
            self.fill("precision", matrix, measure_precision(seen.problem))

    def measure_composite(self, matrix: Matrix, seen: Sequence[Observation]) -> None:
        """Measure what is made of the matrices that were `seen`: a stack, a block or a pair."""
        match matrix.kind:
            case "stack":
                self.measure_spectra(matrix, side_by_side(seen))
            case "block" if matrix.block is not None:
                self.fill("blocks", matrix, measure_block(seen[0].part(matrix.block.axis, matrix.block.outputs)))
            case "pair" if seen[0].problem is not None and seen[1].problem is not None:
                self.fill("stacking", matrix, measure_pair(seen[0].problem, seen[1].problem))

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
        """Index of the schedule in the run's list."""
        entry: dict[str, Any] = {"coefficients": [list(triple) for triple in newton_schulz.coefficients], "eps": newton_schulz.eps}
        if newton_schulz.scaling != "frobenius":  # what an entry without it means
            entry["scaling"] = newton_schulz.scaling
        return self.schedule_index(entry)

    def schedule_index(self, entry: dict[str, Any]) -> int:
        """Index of an entry of the run's list, added when new."""
        if entry not in self.ns_schedules:
            self.ns_schedules.append(entry)
        return self.ns_schedules.index(entry)


@dataclass
class Readings:
    """What one optimizer's step gives to a record: read around the step, then measured, at once or by the worker.

    Attributes:
        matrices: all of the optimizer's.
        known: what of the group `update` is known already.
        observations: what each matrix's is made by.
        pieces: what is here of parameters that lie in pieces on several ranks.
        has_state: where ranks record together, whether the optimizer keeps state here of those that are whole, by name.
        fingerprints: where they do, of what may be copied on other ranks.
        place: where ranks record together, where in the training the step was.
        copies: what these look at, where the training goes on meanwhile.
    """

    matrices: list[Matrix]
    known: dict[Matrix, Measured] = field(default_factory=dict)
    observations: list[tuple[Matrix, Callable[[], Observation]]] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)
    pieces: list[PieceSnapshot] = field(default_factory=list)
    has_state: dict[str, bool] = field(default_factory=dict)
    fingerprints: Fingerprints = field(default_factory=dict)
    place: Mapping[int, int] = field(default_factory=dict)

    def read(self, snapshots: list[Snapshot | PieceSnapshot], journal: Journal, step: int) -> None:
        """Take what was copied before the step, and what there is to read after it."""
        while snapshots:
            snapshot = snapshots.pop()
            with journal.guard(step):
                if isinstance(snapshot, PieceSnapshot):
                    self.pieces += [snapshot] if snapshot.read() else []
                    continue
                self.observations.extend(snapshot.read())
                if snapshot.copies is not None:
                    self.copies.append(snapshot.copies)
            for error in snapshot.errors:
                journal.failed(error, step)

    def measure(self, record: Record, journal: Journal) -> None:
        """Fill in the record. What fails is missing from it, and nothing else."""
        # All of torch's work first, then all of NumPy's: alternating, their thread pools wait for each other. Every list
        # lets go of a matrix once it is measured, so that memory holds the float64 copies of one at a time.
        made: list[tuple[Matrix, Observation]] = []
        piece: Callable[[], AbstractContextManager[None]] = nullcontext if journal.worker is None else fork_safe
        for matrix, known in self.known.items():
            record.fill("update", matrix, known)
        while self.observations:
            matrix, observation = self.observations.pop(0)
            with journal.guard(record.step), piece():
                made.append((matrix, observation()))
        self._measure_composites(record, dict(made), journal, piece)
        while made:
            matrix, seen = made.pop()
            with journal.guard(record.step), piece():
                record.measure(matrix, seen)
                record.measure_spectra(matrix, seen)
            del seen
        for copies in self.copies:
            copies.give_back()

    def _measure_composites(
        self, record: Record, seen: dict[Matrix, Observation], journal: Journal, piece: Callable[[], AbstractContextManager[None]]
    ) -> None:
        for composite in self.matrices:
            if composite.members and all(member in seen for member in composite.members):
                with journal.guard(record.step), piece():
                    record.measure_composite(composite, [seen[member] for member in composite.members])
