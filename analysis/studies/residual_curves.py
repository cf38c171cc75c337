"""How many Newton–Schulz steps does each operator need? Residual curves from recorded spectra, for any coefficients."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from ...diagnostics.bootstrap import interval, resampled, with_interval
from ...diagnostics.evenly_spread import evenly_spread
from ...diagnostics.schedules.deriving import RECORDS, SCHEDULES, STEPS, mean_residuals
from ..figures import axes, finish, operator_palette
from ..run import operators_of, orthogonalised, residuals_of_records

QUESTION = "How many Newton–Schulz steps does each operator need?"
READING = (
    "Each line shows how much of an operator's matrices is left unorthogonalised after k steps, shaded 95 % over layers. Lines that are already low at few "
    "steps can give steps away; lines that still fall steeply at the right would use more."
)


# Compared by default: a design per step count, and the two lists in widest use.
FAMILIES = ("matched", "jordan", "polar_express")


def study(run: xr.DataTree, window: slice | None = None, families: Sequence[str] = FAMILIES, records: int = RECORDS) -> xr.Dataset:
    """Mean residual R_g(k) per operator g, for schedules of 3 to 8 steps of each family.

    "matched" is designed anew for every k; the others are the first k steps of their list. Residuals follow from the
    recorded spectra by the scalar recurrence; no training is run again.

    Args:
        run: as from `open_run`.
        window: steps to average over, both ends included; by default all.
        families: of those in `diagnostics.ns_schedules`; by default "matched", "jordan" and "polar_express".
        records: of the window at most so many, evenly spread, as each spectrum is mapped anew.

    Returns:
        `residual` (family, operator, k): mean over the operator's matrices and the window's records, with `residual_low` and `residual_high`, 95 % over
        layers; `convex` (family, operator):
        whether each further step gains no more than the one before; `snapshots`. Operators without a
        spectrum in the window are left out.

    Raises:
        ValueError: no orthogonalised matrix, or no spectrum in the window.
    """
    everything = orthogonalised(run)[["sigma_quantile"]]
    inside = everything.sel(step=window or slice(None))
    geometry = inside.isel(step=evenly_spread(inside.sizes["step"], records)).load()
    seen = np.isfinite(geometry["sigma_quantile"].values).all(axis=-1).any(axis=0)
    if not seen.any():
        first, last = (int(everything["step"].values[i]) for i in (0, -1))
        raise ValueError(f"window: no spectrum recorded in that range of steps; the run's records go from {first} to {last}")
    geometry = geometry.isel(matrix=np.flatnonzero(seen))
    operators = operators_of(geometry)
    label = geometry["operator"].values
    residual = residuals_of_records(geometry, [SCHEDULES[family](k) for family in families for k in STEPS])
    known = np.isfinite(residual)
    total, count = np.where(known, residual, 0).sum(axis=1), known.sum(axis=1)  # of each matrix, over the records
    shape = (len(operators), len(families), len(STEPS))
    mean, low, high = np.empty(shape), np.empty(shape), np.empty(shape)
    for g, operator in enumerate(operators):
        own, layers = label == operator, geometry["layer"].values[label == operator]
        mean[g] = mean_residuals(residual, own).reshape(shape[1:])
        drawn = np.nansum(resampled(total[:, own], layers), axis=-1) / np.nansum(resampled(count[:, own], layers), axis=-1)
        low[g], high[g] = (end.reshape(shape[1:]) for end in interval(drawn))
    mean, low, high = (np.moveaxis(values, 0, 1) for values in (mean, low, high))
    gains = -np.diff(mean, axis=-1)
    return xr.Dataset(
        {
            "residual": (("family", "operator", "k"), mean),
            "residual_low": (("family", "operator", "k"), low),
            "residual_high": (("family", "operator", "k"), high),
            "convex": (("family", "operator"), (np.diff(gains, axis=-1) <= 1e-9).all(axis=-1) & (gains >= 0).all(axis=-1)),
            "snapshots": geometry.sizes["step"],
        },
        coords={"family": list(families), "operator": operators, "k": list(STEPS)},
        attrs={"first_step": int(geometry["step"].values[0]), "last_step": int(geometry["step"].values[-1])},
    )


def plot(dataset: xr.Dataset) -> Figure:
    """One panel per family, one line per operator, with a band of 95 % over layers."""
    operators = [str(o) for o in dataset["operator"].values]
    families = [str(f) for f in dataset["family"].values]
    figure, panels = axes(len(families), width=4.6)
    for ax, family in zip(panels, families, strict=True):
        table = dataset["residual"].sel(family=family).to_dataframe().reset_index()
        sns.lineplot(
            table,
            x="k",
            y="residual",
            hue="operator",
            palette=operator_palette(operators),
            hue_order=operators,
            marker="o",
            ax=ax,
            legend=ax is panels[-1],
            errorbar=None,
        )
        for operator in operators:
            one = dataset.sel(family=family, operator=operator)
            ends = one["residual_low"].values, one["residual_high"].values
            ax.fill_between(one["k"].values, *ends, color=operator_palette(operators)[operator], alpha=0.2, linewidth=0)
        ax.set_ylim(0, float(np.nanmax([dataset["residual"].max(), dataset["residual_high"].max()])) * 1.05)
        design = "one design per step count" if family == "matched" else "first k steps of the list"
        finish(ax, title=f"{family}: {design}", x="Newton–Schulz steps k", y="mean Gram residual ε̃" if ax is panels[0] else "")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    at_five = dataset["residual"].sel(k=5)
    hardest = at_five.isel(family=0).to_series().idxmax()
    values = ", ".join(f"{f!s} {float(at_five.sel(family=f).mean()):.3f}" for f in dataset["family"].values)
    convex = int(dataset["convex"].isel(family=0).sum())
    value, low, high = (float(dataset[f"residual{suffix}"].isel(family=0).sel(k=5, operator=hardest)) for suffix in ("", "_low", "_high"))
    return (
        f"Mean residual after 5 steps: {values}. Hardest operator: {hardest}, {with_interval(value, low, high, '.3f')}. {convex} of {dataset.sizes['operator']} curves are convex "
        f"({dataset['family'].values[0]!s}), so a greedy allocation {'is exact where costs are equal' if convex == dataset.sizes['operator'] else 'may fail'}."
    )
