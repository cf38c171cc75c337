"""Spectra as a run stores them, and what any Newton–Schulz schedule would have made of them.

A record keeps 64 normalised singular values per matrix (:mod:`.spectrum_sketch`). Newton–Schulz acts on singular values alone, so the
residual under any coefficients follows from them; no training is run again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .newton_schulz import gram_residual, ns_map
from .ns_families import Coefficients, Triple
from .spectrum_sketch import unsketch

Floats = NDArray[np.float64]

CACHED = 2**15  # singular values that are mapped at a time


@dataclass(frozen=True)
class RecordedSpectra:
    """Spectra of matrices over records: all that a schedule is derived from.

    Attributes:
        name, operator, layer, rows, cols: of every matrix, shape (matrices,).
        step: of every record, shape (records,).
        stored: 64 of x = σ/‖M‖_F in ascending order, shape (records, matrices, 64); NaN where nothing was recorded.
        in_force: Gram residual under the schedule that was in force, shape (records, matrices).
    """

    name: NDArray[Any]
    operator: NDArray[Any]
    layer: NDArray[np.integer[Any]]
    rows: NDArray[np.integer[Any]]
    cols: NDArray[np.integer[Any]]
    step: NDArray[np.integer[Any]]
    stored: NDArray[np.floating[Any]]
    in_force: Floats

    @property
    def ranks(self) -> NDArray[np.integer[Any]]:
        """r = min(rows, cols) of every matrix."""
        return np.asarray(np.minimum(self.rows, self.cols))

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Which matrices have a spectrum in some record."""
        return np.asarray(np.isfinite(self.stored).all(axis=-1).any(axis=0))

    def of_matrices(self, chosen: NDArray[Any]) -> "RecordedSpectra":
        """Those of some matrices, an index or a mask."""
        parts = {field: getattr(self, field)[chosen] for field in ("name", "operator", "layer", "rows", "cols")}
        return replace(self, **parts, stored=self.stored[:, chosen], in_force=self.in_force[:, chosen])

    def of_records(self, chosen: NDArray[Any] | slice) -> "RecordedSpectra":
        """Those of some records, an index, a mask or a slice."""
        return replace(self, step=self.step[chosen], stored=self.stored[chosen], in_force=self.in_force[chosen])


@dataclass(frozen=True)
class NsSchedule:
    """A Newton–Schulz schedule that was in force during a run; `scaling` as in `diagnostics.observation.NewtonSchulz`."""

    coefficients: Coefficients
    eps: float
    scaling: str = "frobenius"


def ns_schedules_of(entries: Sequence[Mapping[str, Any]]) -> list[NsSchedule]:
    """The schedules that the variable `ns_schedule` points to, from the attribute that lists them."""
    return [
        NsSchedule(tuple((a, b, c) for a, b, c in entry["coefficients"]), entry["eps"], entry.get("scaling", "frobenius"))
        for entry in entries
    ]


def read_back(stored: NDArray[np.floating[Any]], ranks: NDArray[np.integer[Any]]) -> Iterator[tuple[NDArray[np.intp], Floats]]:
    """All spectra, shape (pairs, rank) and descending, with the (record, matrix) pairs they are of, as indices into those flattened.

    So many at a time as a processor's cache holds: what is done to them is three times as fast as on all at once.
    """
    place = np.arange(stored.shape[0] * stored.shape[1]).reshape(stored.shape[:2])
    for rank in np.unique(ranks):
        own = place[:, ranks == rank].ravel()
        block = max(1, CACHED // int(rank))
        for start in range(0, len(own), block):
            pairs = own[start : start + block]
            yield pairs, unsketch(stored.reshape(-1, stored.shape[-1])[pairs], int(rank))


def residuals_under(stored: NDArray[np.floating[Any]], ranks: NDArray[np.integer[Any]], schedules: Sequence[Coefficients]) -> Floats:
    """Gram residual of every recorded spectrum under each of `schedules`, shape (schedule, record, matrix).

    Spectra are read back once, and steps that schedules begin with alike are taken once.
    """
    residual = np.full((len(schedules), *stored.shape[:2]), np.nan)
    flat = residual.reshape(len(schedules), -1)
    for pairs, x in read_back(stored, ranks):
        for i, o in outputs_under(x, schedules):
            flat[i, pairs] = gram_residual(o)
    return residual


def outputs_under(x: Floats, schedules: Sequence[Coefficients]) -> Iterator[tuple[int, Floats]]:
    """Singular values x after each schedule, with its place among `schedules`; steps that schedules begin with alike are taken once."""
    yield from _outputs(x, list(enumerate(schedules)))


def _outputs(x: Floats, schedules: list[tuple[int, Coefficients]]) -> Iterator[tuple[int, Floats]]:
    following: dict[Triple, list[tuple[int, Coefficients]]] = {}
    for i, coefficients in schedules:
        if coefficients:
            following.setdefault(coefficients[0], []).append((i, coefficients[1:]))
        else:
            yield i, x
    for triple, rest in following.items():
        yield from _outputs(ns_map(x, (triple,)), rest)


def residual_in_force(
    curve: NDArray[np.floating[Any]],
    index: NDArray[np.integer[Any]],
    schedules: Sequence[NsSchedule],
    stored: ArrayLike,
    ranks: NDArray[np.integer[Any]],
) -> Floats:
    """Predicted Gram residual at the number of steps that was in force, shape (records, matrices); missing where not recorded.

    Args:
        curve: the recorded `ns_residual`, shape (records, matrices, 1 + steps).
        index: the recorded `ns_schedule`, shape (records, matrices).
        schedules: what that points to.
        stored: as in :class:`RecordedSpectra`; read only where a schedule was longer than the curve.
        ranks: of every matrix.
    """
    residual = np.full(index.shape, np.nan)
    for i, schedule in enumerate(schedules):
        steps = len(schedule.coefficients)
        # Curves are recorded up to 10 steps, exactly; what a longer schedule leaves follows from the stored singular values, but
        # not from another start than M/‖M‖_F, which they are of.
        if steps < curve.shape[-1]:
            own = curve[..., steps]
        elif schedule.scaling == "frobenius":
            own = residuals_under(np.asarray(stored), ranks, [schedule.coefficients])[0]
        else:
            own = np.full(index.shape, np.nan)
        residual = np.where(index == i, own, residual)
    return residual
