"""The spectra of a recorder's records, kept in memory as the run stores them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...diagnostics.newton_schulz.recorded_spectra import RecordedSpectra, ns_schedules_of, residual_in_force
from ..observing.matrix import Matrix
from ..recording.record import Record


class Key(NamedTuple):
    """What tells a matrix from another, and what is derived from its name."""

    name: str
    operator: str
    layer: int
    rows: int
    cols: int
    optimizer: str

    @classmethod
    def of(cls, matrix: Matrix) -> "Key":
        """That of a row of the run."""
        return cls(matrix.name, matrix.operator, matrix.layer, matrix.rows, matrix.cols, matrix.optimizer)


@dataclass(frozen=True)
class Observed:
    """One record: 64 singular values and the residual in force of every matrix that was known by then, NaN where there are none."""

    step: int
    stored: NDArray[np.floating[Any]]  # (matrices, 64)
    in_force: NDArray[np.float64]  # (matrices,)


class ObservedSpectra:
    """Spectra of the matrices of some optimizers, in the order of the run's rows; 264 bytes for a matrix and a record.

    Attributes:
        records: those that are kept, oldest first.
        rates: of every record that is kept, its step and the largest learning rate of a matrix that is orthogonalised.
    """

    def __init__(self, optimizers: Collection[str]) -> None:
        """`optimizers` are the labels of those whose matrices are looked at."""
        self._optimizers = optimizers
        self._place: dict[Key, int] = {}
        self._orthogonalised: set[Key] = set()
        self.records: list[Observed] = []
        self.rates: list[tuple[int, float]] = []

    @property
    def matrices(self) -> Collection[Key]:
        """All that were seen, in the order of the run's rows."""
        return self._place.keys()

    def add(self, record: Record) -> None:
        """Keep what a record says of the spectra; of a step that is kept already, as the run does, what comes last."""
        rows = record.rows["geometry"]
        row_of = {Key.of(m): row for m, row in record.row_of["geometry"].items() if m.optimizer in self._optimizers}
        for key in sorted(row_of, key=row_of.__getitem__):
            self._place.setdefault(key, len(self._place))
            if rows["ns_schedule"][row_of[key]] >= 0:
                self._orthogonalised.add(key)
        keys, own = list(row_of), list(row_of.values())
        place = [self._place[key] for key in keys]
        ranks = np.array([min(key.rows, key.cols) for key in keys])
        stored = np.full((len(self._place), rows["sigma_quantile"].shape[-1]), np.nan, rows["sigma_quantile"].dtype)
        stored[place] = rows["sigma_quantile"][own]
        in_force = np.full(len(self._place), np.nan)
        in_force[place] = residual_in_force(
            rows["ns_residual"][None, own], rows["ns_schedule"][None, own], ns_schedules_of(record.ns_schedules), stored[None, place], ranks
        )[0]
        self.records = [kept for kept in self.records if kept.step != record.step]
        self.records.append(Observed(record.step, stored, in_force))
        self.rates.append((record.step, self._learning_rate(record)))

    def _learning_rate(self, record: Record) -> float:
        names = {key.name for key in self._orthogonalised}
        rows = [row for m, row in record.row_of.get("update", {}).items() if m.name in names]
        rates = record.rows["update"]["lr"][rows] if rows else np.array([np.nan])
        return float(np.nanmax(rates)) if np.isfinite(rates).any() else float("nan")

    def forget(self, before: int) -> None:
        """Keep only records from a step on, and only their learning rates."""
        self.records = [record for record in self.records if record.step >= before]
        self.rates = [(step, rate) for step, rate in self.rates if step >= before]

    def window(self, first: int, last: int) -> RecordedSpectra:
        """The spectra of the kept records of these steps, both included, of the matrices that were orthogonalised in any record."""
        records = [record for record in self.records if first <= record.step <= last]
        chosen = [(key, place) for key, place in self._place.items() if key in self._orthogonalised]
        keys, place = [key for key, _ in chosen], [place for _, place in chosen]
        width = next((record.stored.shape[-1] for record in records), 0)
        stored = np.full((len(records), len(keys), width), np.nan, records[0].stored.dtype if records else np.float32)
        in_force = np.full((len(records), len(keys)), np.nan)
        for i, record in enumerate(records):
            known = [j for j, p in enumerate(place) if p < len(record.in_force)]  # a matrix may have come later
            stored[i, known] = record.stored[[place[j] for j in known]]
            in_force[i, known] = record.in_force[[place[j] for j in known]]
        return RecordedSpectra(
            name=np.array([key.name for key in keys]), operator=np.array([key.operator for key in keys]),
            layer=np.array([key.layer for key in keys]), rows=np.array([key.rows for key in keys]),
            cols=np.array([key.cols for key in keys]), step=np.array([record.step for record in records]),
            stored=stored, in_force=in_force,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain containers and tensors."""
        return {
            "matrices": [list(key) for key in self._place],
            "orthogonalised": [key in self._orthogonalised for key in self._place],
            "rates": [list(rate) for rate in self.rates],
            "records": [
                {"step": r.step, "stored": torch.from_numpy(r.stored.copy()), "in_force": torch.from_numpy(r.in_force.copy())}
                for r in self.records
            ],
        }

    @classmethod
    def of_state(cls, optimizers: Collection[str], state: dict[str, Any]) -> "ObservedSpectra":
        """What goes on from what :meth:`state_dict` gave."""
        found = cls(optimizers)
        keys = [Key(*parts) for parts in state["matrices"]]
        found._place = {key: i for i, key in enumerate(keys)}
        found._orthogonalised = {key for key, used in zip(keys, state["orthogonalised"], strict=True) if used}
        found.rates = [(int(step), float(rate)) for step, rate in state["rates"]]
        found.records = [
            Observed(int(r["step"]), r["stored"].cpu().numpy().copy(), r["in_force"].cpu().numpy().copy()) for r in state["records"]
        ]
        return found
