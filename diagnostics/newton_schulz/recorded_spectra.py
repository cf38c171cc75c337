"""Spectra as a run stores them, and the residual that any Newton–Schulz schedule would have left of them.

A record keeps 64 normalised singular values per matrix (:mod:`..spectra.spectrum_sketch`). Newton–Schulz acts on singular values alone, so the
residual under any coefficients follows from them; no training is run again.

Some of that residual no schedule can lower. Muon iterates in bfloat16, and singular values x below the rounding noise of the cast,
φ = 0.425·2⁻⁸(1/√m + 1/√n), are noise: steps spent on them turn it, not the momentum, into an orthogonal matrix. The residual over the
recoverable values, x_i ≥ φ, leaves them out (:class:`WindowResiduals`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..spectra.spectrum import BFLOAT16_ROUNDOFF, precision_floor
from ..spectra.spectrum_sketch import unsketch
from .families import Coefficients, Triple
from .spectral_map import gram_residual, ns_map

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
        """The spectra of some matrices, chosen by an index or a mask."""
        parts = {field: getattr(self, field)[chosen] for field in ("name", "operator", "layer", "rows", "cols")}
        return replace(self, **parts, stored=self.stored[:, chosen], in_force=self.in_force[:, chosen])

    def of_records(self, chosen: NDArray[Any] | slice) -> "RecordedSpectra":
        """The spectra of some records, chosen by an index, a mask or a slice."""
        return replace(self, step=self.step[chosen], stored=self.stored[chosen], in_force=self.in_force[chosen])


@dataclass(frozen=True)
class NsSchedule:
    """A Newton–Schulz schedule that was in force during a run; `scaling` as in `diagnostics.quantities.problem.NewtonSchulz`."""

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
        schedules: the schedules that `index` points to.
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


@dataclass(frozen=True)
class WindowResiduals:
    """Squared Gram residuals ε̃² = mean_i (1 − o_i²)² of every spectrum under every schedule, NaN where none was recorded.

    Attributes:
        square: ε̃², shape (schedules, records, matrices).
        square_recoverable: the part of it that the values x_i ≥ φ make up, (1/r)Σ over them; same shape.
        recoverable: the share of singular values with x_i ≥ φ, shape (records, matrices). Since Σx² = 1 and φ < 1/√r, the
            largest is always one of them; only a spectrum of zeros has none, and counts as not recorded where they are left out.
    """

    square: Floats
    square_recoverable: Floats
    recoverable: Floats

    def residual(self, *, recoverable: bool = False) -> Floats:
        """ε̃ over all singular values, or over the recoverable ones alone; shape (schedules, records, matrices)."""
        if not recoverable:
            return np.sqrt(self.square)
        return np.sqrt(self.square_recoverable / np.where(self.recoverable > 0, self.recoverable, np.nan))


def window_residuals(spectra: RecordedSpectra, schedules: Sequence[Coefficients]) -> WindowResiduals:
    """The residuals of every spectrum under each of `schedules`, with the part of each that the recoverable values make up."""
    shape = spectra.stored.shape[:2]
    square = np.full((2, len(schedules), *shape), np.nan)
    share = np.full(shape, np.nan)
    flat, flat_share = square.reshape(2, len(schedules), -1), share.reshape(-1)
    floor = np.array([precision_floor(m, n, BFLOAT16_ROUNDOFF) for m, n in zip(spectra.rows.tolist(), spectra.cols.tolist(), strict=True)])
    for pairs, x in read_back(spectra.stored, spectra.ranks):
        above = (x >= floor[pairs % shape[1], None]).astype(np.float64)
        flat_share[pairs] = np.where(np.isfinite(x).all(axis=-1), above.mean(axis=-1), np.nan)
        for i, o in outputs_under(x, schedules):
            # A schedule that escapes ends in inf and nan; that is its true result.
            with np.errstate(over="ignore", invalid="ignore"):
                terms = (1 - o * o) ** 2
                flat[0, i, pairs] = terms.mean(axis=-1)
                flat[1, i, pairs] = np.where(above > 0, terms, 0).mean(axis=-1)
    flat[1][:, np.isnan(flat_share)] = np.nan
    return WindowResiduals(square[0], square[1], share)
