"""What any Newton–Schulz family would have made of a run's momenta, from its logged spectra alone; and what bfloat16 takes from that."""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ..diagnostics.evenly_spread import evenly_spread
from ..diagnostics.newton_schulz.coefficients import SCHEDULE_FAMILIES, coefficients_of
from ..diagnostics.newton_schulz.families import FAMILIES, Coefficients
from ..diagnostics.newton_schulz.recorded_spectra import outputs_under
from ..diagnostics.newton_schulz.spectral_map import ns_flops
from ..diagnostics.newton_schulz.validation import of_family
from ..diagnostics.schedules.low_precision import bfloat16_outcomes
from ..diagnostics.spectra.spectrum import BFLOAT16_ROUNDOFF, precision_floor
from ..diagnostics.spectra.spectrum_sketch import unsketch
from .run import ns_schedules, operators_of, orthogonalised
from .scheduling import default_window

Floats = NDArray[np.float64]

# ROOT's are fitted to single shapes; withdrawn lists and misprints are not to be used.
DEFAULT_FAMILIES = tuple(f for f in SCHEDULE_FAMILIES if not f.startswith("root_") and not (f in FAMILIES and FAMILIES[f].wrong))
STEPS = (3, 4, 5, 6, 7, 8)
PRECISIONS = ("float64", "bfloat16")
RECORDS = 8


def what_if(
    run: xr.DataTree,
    window: slice | None = None,
    families: Sequence[str] = DEFAULT_FAMILIES,
    steps: Sequence[int] = STEPS,
    records: int = RECORDS,
) -> xr.Dataset:
    """Residual, alignment and FLOPs under every family and number of steps, in float64 and as bfloat16 would have had it.

    float64 is the scalar recurrence, bfloat16 the model of `diagnostics.low_precision` (within 2 % of an operator's mean up to five
    steps; its docstring says what beyond). Nothing is trained or iterated again.

    Args:
        run: as from `open_run`.
        window: steps to average over, both ends included; by default that of `derive_schedule`.
        families: of `diagnostics.ns_schedules.SCHEDULE_FAMILIES`; by default all but ROOT's single shapes and withdrawn lists.
        steps: numbers of steps, at least 1; "matched" has designs for 3 to 8.
        records: of the window at most so many, evenly spread.

    Returns:
        `residual` and `alignment` (⟨M, O⟩/‖M‖_*), each (family, operator, k, precision): means over an operator's matrices and the records;
        `mean_residual` and `mean_alignment` (family, k, precision) over all matrices; `cost` (family, operator, k), FLOPs, and
        `relative_cost` (family, k), relative to five quintic steps for all; `recoverable` (operator), the share of singular values
        over bfloat16's floor, and `residual_recoverable` (family, operator, k) and `mean_residual_recoverable` (family, k) over those alone,
        in float64. Of what was in force: `in_force_residual` and `in_force_alignment` (operator, precision), predicted; `achieved_residual` and
        `achieved_alignment` (operator), read back from the updates; over records that hold both; `in_force_residual_recoverable`
        (operator), predicted in float64; `in_force_relative_cost`, NaN where its steps were not recorded, and the attribute `in_force`, its name.

    Raises:
        ValueError: an unknown family, a number of steps out of range, nothing orthogonalised in the run, or no spectrum in the window.
    """
    if not families or not steps:
        raise ValueError("families, steps: expected at least one of each, got none")
    schedules = [coefficients_of(family, k) for family in families for k in steps]
    everything = orthogonalised(run)
    inside = everything.sel(step=default_window(run) if window is None else window)
    geometry = inside.isel(step=evenly_spread(inside.sizes["step"], records))
    stored = geometry["sigma_quantile"].values
    known = np.isfinite(stored).all(axis=-1)
    if not known.any():
        first, last = (int(everything["step"].values[i]) for i in (0, -1))
        raise ValueError(f"window: no spectrum recorded in that range of steps; the run's records go from {first} to {last}")
    keep = np.flatnonzero(known.any(axis=0))
    geometry, stored, known = geometry.isel(matrix=keep), stored[:, keep], known[:, keep]

    own = ns_schedules(geometry)
    values = np.full((3, 2, len(schedules), *known.shape), np.nan)  # residual, alignment, recoverable residual; precision
    share = np.full(known.shape, np.nan)
    in_force = np.full((3, 2, *known.shape), np.nan)  # the same
    spent = np.full(known.shape, np.nan)  # FLOPs of what was in force
    rows, cols, index = geometry["rows"].values, geometry["cols"].values, geometry["ns_schedule"].values
    norm = geometry["fro_norm"].values
    for m, n in sorted(set(zip(rows.tolist(), cols.tolist(), strict=True))):
        t, j = np.nonzero(known & (rows == m) & (cols == n))
        x = unsketch(stored[t, j], min(m, n))
        above = x >= precision_floor(m, n, BFLOAT16_ROUNDOFF)
        share[t, j] = above.mean(axis=-1)
        values[:, :, :, t, j] = _outcomes(x, above, m, n, schedules, norm[t, j])
        for i, schedule in enumerate(own):
            # Another start than M/‖M‖_F has other singular values than those recorded.
            chosen = index[t, j] == i
            if schedule.coefficients:
                spent[t[chosen], j[chosen]] = sum(ns_flops(m, n, cubic=c == 0) for _, _, c in schedule.coefficients)
            if chosen.any() and schedule.coefficients and schedule.scaling == "frobenius":
                found = _outcomes(x[chosen], above[chosen], m, n, [schedule.coefficients], norm[t, j][chosen], schedule.eps)
                in_force[:, :, t[chosen], j[chosen]] = found[:, :, 0]

    label, operators = geometry["operator"].values, operators_of(geometry)
    groups = [label == o for o in operators]
    shape = (len(families), len(steps))
    by_operator = np.stack([_mean(values[..., group]) for group in groups], axis=-1).reshape(3, 2, *shape, -1)
    overall = _mean(values).reshape(3, 2, *shape)
    cost = np.array([[_flops(schedule, rows[group], cols[group]) for schedule in schedules] for group in groups]).T.reshape(*shape, -1)
    uniform = 5 * sum(ns_flops(m, n) for m, n in zip(rows.tolist(), cols.tolist(), strict=True))
    achieved = np.stack([geometry[name].values.astype(np.float64) for name in ("ns_residual_achieved", "alignment")])
    both = np.isfinite(in_force[:2]).all(axis=1) & np.isfinite(achieved)
    predicted, achieved = np.where(both[:, None], in_force[:2], np.nan), np.where(both, achieved, np.nan)
    dims = ("family", "operator", "k", "precision")
    order = np.moveaxis(by_operator, (0, 1, 2, 3, 4), (0, 4, 1, 3, 2))
    means = np.moveaxis(overall, 1, -1)
    in_force_means = np.stack([_mean(predicted[..., group]) for group in groups], axis=1)
    achieved_means = np.stack([_mean(achieved[..., group]) for group in groups], axis=1)
    return xr.Dataset(
        {
            "residual": (dims, order[0]),
            "alignment": (dims, order[1]),
            "residual_recoverable": (dims[:3], order[2, ..., 0]),
            "mean_residual": (("family", "k", "precision"), means[0]),
            "mean_alignment": (("family", "k", "precision"), means[1]),
            "mean_residual_recoverable": (("family", "k"), overall[2, 0]),
            "cost": (dims[:3], np.moveaxis(cost, -1, 1)),
            "relative_cost": (("family", "k"), cost.sum(axis=-1) / uniform),
            "recoverable": ("operator", [float(np.nanmean(share[:, group])) for group in groups]),
            "in_force_residual": (("operator", "precision"), in_force_means[0]),
            "in_force_alignment": (("operator", "precision"), in_force_means[1]),
            "achieved_residual": ("operator", achieved_means[0]),
            "achieved_alignment": ("operator", achieved_means[1]),
            "in_force_residual_recoverable": ("operator", [float(_mean(in_force[2, 0][:, group])) for group in groups]),
            "in_force_relative_cost": _relative(spent, rows, cols),
            "matrices": ("operator", [int(group.sum()) for group in groups]),
        },
        coords={"family": list(families), "operator": operators, "k": list(steps), "precision": list(PRECISIONS)},
        attrs={
            "first_step": int(geometry["step"].values[0]),
            "last_step": int(geometry["step"].values[-1]),
            "records": geometry.sizes["step"],
            "in_force": _named([own[i].coefficients for i in np.unique(index[known & np.isfinite(spent)])]),
        },
    )


def _outcomes(
    x: Floats, above: NDArray[np.bool_], rows: int, cols: int, schedules: Sequence[Coefficients], norm: Floats, eps: float = 0.0
) -> Floats:
    """Residual, alignment and residual over the recoverable values, in float64 and in bfloat16; shape (3, 2, schedules, spectra)."""
    found = np.full((3, 2, len(schedules), len(x)), np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        for i, o in outputs_under(x, schedules):
            terms = (1 - o * o) ** 2
            found[0, 0, i] = np.sqrt(terms.mean(axis=-1))
            found[1, 0, i] = (x * o).sum(axis=-1) / x.sum(axis=-1)
            found[2, 0, i] = np.sqrt(np.where(above, terms, 0).sum(axis=-1) / above.sum(axis=-1))
    found[0, 1], found[1, 1] = bfloat16_outcomes(x, rows, cols, schedules, norm, eps)
    return found


def _mean(values: Floats) -> Floats:
    """Over records and matrices, the last two axes, of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=(-2, -1))
    return np.asarray(np.where(known, values, 0).sum(axis=(-2, -1)) / np.where(count, count, np.nan))


def _flops(schedule: Coefficients, rows: NDArray[np.integer], cols: NDArray[np.integer]) -> int:
    """Of a schedule on matrices of these shapes."""
    shapes = list(zip(rows.tolist(), cols.tolist(), strict=True))
    return sum(ns_flops(m, n, cubic=c == 0) for m, n in shapes for _, _, c in schedule)


def _relative(spent: Floats, rows: NDArray[np.integer], cols: NDArray[np.integer]) -> float:
    """FLOPs over those of five quintic steps of the same matrices, where they are known."""
    five = np.broadcast_to([5 * ns_flops(m, n) for m, n in zip(rows.tolist(), cols.tolist(), strict=True)], spent.shape)
    known = np.isfinite(spent)
    return float(spent[known].sum() / five[known].sum()) if known.any() else float("nan")


def _named(schedules: Sequence[Coefficients]) -> str:
    """What was in force, in words: "5 steps of jordan", "3 to 7 steps"; empty where that was not recorded."""
    counts = sorted({len(schedule) for schedule in schedules})
    if not counts:
        return ""
    steps = f"{counts[0]} steps" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} steps"
    names = {_family_of(schedule) for schedule in schedules}
    return f"{steps} of {names.pop()}" if len(names) == 1 and None not in names else steps


def _family_of(schedule: Coefficients) -> str | None:
    k = len(schedule)
    names = (name for name in SCHEDULE_FAMILIES if name != "matched" or k in STEPS)
    return next((name for name in names if np.allclose(coefficients_of(name, k), schedule, rtol=1e-6)), None)


def hazardous(dataset: xr.Dataset) -> list[str]:
    """Families of a table that are not to be put into force: lists with an error or a warning of `diag ns`, whatever the residual."""
    known = [str(family) for family in dataset["family"].values if family in FAMILIES]
    return [name for name in known if any(hazard.severity != "info" for hazard in of_family(FAMILIES[name]).hazards)]


def table(dataset: xr.Dataset) -> list[dict[str, float | int | str]]:
    """One row per family, number of steps and operator, "all" for the mean over matrices: what a CSV holds."""
    rows: list[dict[str, float | int | str]] = []
    for f, family in enumerate(dataset["family"].values.tolist()):
        for i, k in enumerate(dataset["k"].values.tolist()):
            own = {"family": family, "k": k}
            both = {name: dataset[f"mean_{name}"].values[f, i] for name in ("residual", "alignment")}
            rows.append({**own, "operator": "all", **_both(both), "cost": float(dataset["cost"].values[f, :, i].sum())})
            for g, operator in enumerate(dataset["operator"].values.tolist()):
                both = {name: dataset[name].values[f, g, i] for name in ("residual", "alignment")}
                cost = float(dataset["cost"].values[f, g, i])
                more = {"residual_recoverable": float(dataset["residual_recoverable"].values[f, g, i])}
                rows.append({**own, "operator": operator, **_both(both), "cost": cost, **more})
    return rows


def _both(values: dict[str, Floats]) -> dict[str, float | int | str]:
    return {f"{name}_{p}": float(pair[i]) for name, pair in values.items() for i, p in enumerate(PRECISIONS)}
