"""What one optimizer's step gives to a record: read around the step, then measured, at once or by the worker."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...diagnostics.quantities.observation import Measured, Observation
from ..observing.copies import Copies
from ..observing.matrices import Matrix
from ..observing.snapshot import Snapshot
from .fork_safe import fork_safe
from .record import Record

if TYPE_CHECKING:
    from .journal import Journal


@dataclass
class Readings:
    """What was read of the matrices of one optimizer, and is to be measured.

    Attributes:
        matrices: all of them.
        known: what of the group `update` is known already.
        readings: what observations are made from.
        copies: what these look at, where the training goes on meanwhile.
    """

    matrices: list[Matrix]
    known: dict[Matrix, Measured] = field(default_factory=dict)
    readings: list[tuple[Matrix, Callable[[], Observation]]] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)

    def read(self, snapshots: list[Snapshot], journal: "Journal", step: int) -> None:
        """Take what was copied before the step, and what there is to read behind it."""
        while snapshots:
            snapshot = snapshots.pop()
            with journal.guard(step):
                self.readings.extend(snapshot.read())
                if snapshot.copies is not None:
                    self.copies.append(snapshot.copies)
            for error in snapshot.errors:
                journal.failed(error, step)

    def measure(self, record: Record, journal: "Journal") -> None:
        """Fill in the record. What fails is missing from it, and nothing else."""
        # All of torch's work first, then all of NumPy's: alternating, their thread pools wait for each other. Every list
        # lets go of a matrix once it is measured, so that memory holds the float64 copies of one at a time.
        observations: list[tuple[Matrix, Observation]] = []
        apart: Callable[[], AbstractContextManager[None]] = nullcontext if journal.worker is None else fork_safe
        for matrix, known in self.known.items():
            record.fill("update", matrix, known)
        while self.readings:
            matrix, observation = self.readings.pop(0)
            with journal.guard(record.step), apart():
                observations.append((matrix, observation()))
        self._measure_composites(record, dict(observations), journal, apart)
        while observations:
            matrix, seen = observations.pop()
            with journal.guard(record.step), apart():
                record.measure(matrix, seen)
                record.measure_spectra(matrix, seen)
            del seen
        for copies in self.copies:
            copies.give_back()

    def _measure_composites(
        self, record: Record, seen: dict[Matrix, Observation], journal: "Journal", apart: Callable[[], AbstractContextManager[None]]
    ) -> None:
        for composite in self.matrices:
            if composite.members and all(member in seen for member in composite.members):
                with journal.guard(record.step), apart():
                    record.measure_composite(composite, [seen[member] for member in composite.members])


def write(record: Record, journal: "Journal") -> None:
    """Hand a filled record to the writer."""
    journal.append(record.rows, record.step)


def behind(action: "Callable[[Record, Journal], None]", record: Record, journal: "Journal") -> None:
    """What the worker does with a record: on its own clock, with what the training thread has noted before."""
    with journal.guard(record.step):
        journal.take_notes()
        action(record, journal)
