"""From a run to a Newton–Schulz schedule per operator (AMO: observe, then commit)."""

import numpy as np
import xarray as xr

from ..diagnostics.evenly_spread import evenly_spread
from ..diagnostics.newton_schulz.recorded_spectra import RecordedSpectra
from ..diagnostics.schedules.deriving import RECORDS, check_choices, schedule_from_spectra
from ..diagnostics.schedules.observation_window import observation_window
from ..diagnostics.schedules.schedule_file import Schedule
from .run import orthogonalised, own_residual, whole_records


def default_window(run: xr.DataTree) -> slice:
    """From the end of learning-rate warm-up (and of the momentum's first 20 steps), 1 % of the steps and at least 8 records.

    Fewer records where the run has no more.
    """
    geometry = orthogonalised(run)
    steps = geometry["step"].values
    rate_steps, rates = steps[:0], np.full(0, np.nan)
    if "update" in run.children and run["update"].sizes.get("step"):
        update = whole_records(run, "update")
        # Of the orthogonalised matrices only: another optimizer may warm up differently, or not at all.
        rate_steps = update["step"].values
        rates = update["lr"].isel(matrix=np.isin(update["name"].values, geometry["name"].values)).max("matrix").values
    return slice(*observation_window(steps, int(steps[-1]), rate_steps, rates))


def derive_schedule(
    run: xr.DataTree,
    *,
    budget: int = 5,
    rule: str = "mean",
    family: str = "matched",
    window: slice | None = None,
    recoverable: bool = False,
    split: str = "auto",
    keep_uniform: bool = True,
) -> Schedule:
    """Steps and coefficients per operator that use a budget of `budget` steps for all better than all-equal steps do.

    The budget is in FLOPs: operators of large matrices pay more per step. Weights are shares of matrices.

    Args:
        run: as from `open_run`.
        budget: step count of the uniform baseline, 3 to 8; the schedule costs no more than it.
        rule: "mean" (least mean residual, no operator worse than the baseline's worst), "mean-uncapped", "minimax",
            "uniform", or "kappa" (from condition numbers and stable ranks alone, without residuals).
        family: "matched" (one design per step count), or another of `diagnostics.ns_schedules` (the first steps of its list, the last held).
        window: steps to average over, both ends included; by default :func:`default_window`. Of more than 32 records, as many evenly spread
            ones are averaged over.
        recoverable: residuals over the singular values above bfloat16's rounding noise alone, below which steps orthogonalise noise.
        split: "auto" cuts an operator in two by depth where the halves of its layers differ more than operators do; "never" does not.
        keep_uniform: hold equal steps for all where the 95 % interval of the gain over layers includes zero.

    Raises:
        ValueError: an argument out of range, nothing orthogonalised in the run, or no record in the window.
    """
    check_choices(budget, rule, family, split)
    window = default_window(run) if window is None else window
    return schedule_from_spectra(
        recorded_spectra(run, window),
        budget=budget,
        rule=rule,
        family=family,
        recoverable=recoverable,
        split=split,
        keep_uniform=keep_uniform,
        provenance={"run": run.encoding.get("source"), "run_created": run.attrs.get("created")},
    )


def recorded_spectra(run: xr.DataTree, window: slice | None = None) -> RecordedSpectra:
    """The spectra of a window of steps, both ends included, of the matrices that were orthogonalised; of at most 32 evenly spread records.

    Raises:
        ValueError: nothing orthogonalised in the run, or no spectrum in the window.
    """
    everything = orthogonalised(run)
    inside = everything.sel(step=window or slice(None))
    geometry = inside.isel(step=evenly_spread(inside.sizes["step"], RECORDS))
    spectra = RecordedSpectra(
        **{name: geometry[name].values for name in ("name", "operator", "layer", "rows", "cols", "step")},
        stored=geometry["sigma_quantile"].values,
        in_force=own_residual(geometry).values,
    )
    if not spectra.seen.any():
        first, last = (int(everything["step"].values[i]) for i in (0, -1))
        raise ValueError(f"window: no spectrum recorded in that range of steps; the run's records go from {first} to {last}")
    return spectra
