"""What does a rank-1 second moment lose? (Adafactor, arXiv 1804.04235, Alg. 1)

With R, C the row and column sums of V, V̂ = RCᵀ/ΣV minimises the I-divergence Σ V ln(V/V̂) − V + V̂ among rank-1 matrices, and what is
left at the optimum is ΣV · MI(V/ΣV): the mutual information of row and column when V is read as a joint distribution. It does not
depend on the scale of V and is at most ln min(rows, cols).
"""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...diagnostics.catalogue import MAP_SIDE
from ..by_operator import by_operator
from ..figures import axes, finish, operator_lines
from ..run import operators_of, recorded, records

QUESTION = "What would be lost if the second moment were kept as one number per row and one per column?"
READING = (
    "Left: zero says that rows and columns tell all there is in the second moment, as Adafactor assumes; the higher, the more is lost. "
    "Middle: by how much single elements are off, in powers of ten; a step goes with the root of that. Where maps were recorded, the "
    "two at the right show the matrix that loses most: what is seen in V and not in its rank-1 form is what Adafactor does not see."
)


def study(run: xr.DataTree) -> xr.Dataset:
    """Mutual information and log error of the rank-1 form of v, per operator and step, and the maps of the matrix that loses most.

    Variables: `information` (nat) and `log_error` (RMS of log10(v/v̂₁), decades), as of `by_operator`; `largest_error` (operator), the
    largest |log10(v/v̂₁)| of all records; `limit` (operator), the median of ln min(rows, cols), which `information` cannot exceed;
    and, where the group second_moment_map was recorded, `map` and `rank1_map` (row, column): mean log10 of v and of v̂₁ over tiles of
    the matrix with the largest median `log_error`, at its last record (attributes `matrix` and `map_step`).

    Raises:
        ValueError: no second moments of all coordinates in the run.
    """
    reason = "no optimizer in it keeps a second moment of every coordinate (Adam does), so there is nothing that a rank-1 form could lose"
    names = ("rank1_information", "rank1_log_error", "rank1_log_error_max")
    moment = recorded(run, "second_moment", *names, otherwise=reason).drop_attrs()
    result = by_operator({"information": moment["rank1_information"], "log_error": moment["rank1_log_error"]})
    operators, label = operators_of(moment), moment["operator"].values
    limit = np.log(np.minimum(moment["rows"].values, moment["cols"].values))
    largest = np.fmax.reduce(moment["rank1_log_error_max"].values, axis=0)
    result["limit"] = ("operator", [float(np.median(limit[label == o])) for o in operators])
    result["largest_error"] = ("operator", [float(np.fmax.reduce(largest[label == o])) for o in operators])
    error = moment["rank1_log_error"].median("step").to_series().set_axis(moment["name"].values)
    return _with_maps(run, result, error.to_dict())


def plot(dataset: xr.Dataset) -> Figure:
    """Information and log error over training; the maps of V and of its rank-1 form where they were recorded."""
    maps = "map" in dataset
    figure, panels = axes(2 + 2 * maps, width=4.8 if maps else 6.0)
    operator_lines(panels[0], dataset, "information", legend=False)
    panels[0].set_ylim(bottom=0)
    finish(panels[0], title="Information lost, median and quartiles", x="optimizer step", y="mutual information of rows and columns (nat)")
    operator_lines(panels[1], dataset, "log_error")
    panels[1].set_ylim(bottom=0)
    finish(panels[1], title="Error of single elements, median and quartiles", x="optimizer step", y="RMS of log10(v/v̂₁) (decades)")
    if maps:
        values = np.stack([dataset["map"].values, dataset["rank1_map"].values])
        finite = values[np.isfinite(values)]
        for ax, name, tiles in zip(panels[2:], ("V", "rank-1 form"), values, strict=True):
            image = ax.imshow(tiles, cmap="viridis", vmin=finite.min(), vmax=finite.max(), aspect="auto", interpolation="nearest")
            ax.grid(visible=False)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            title = f"{name}: {dataset.attrs['matrix']}, step {dataset.attrs['map_step']}"
            finish(ax, title=title, x="column tile", y="row tile")
        figure.colorbar(image, ax=panels[3], label="mean log10 v of the tile (decades)")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    information = dataset["median_information"].to_series().dropna().sort_values()
    if information.empty:
        return "No recorded second moment is finite."
    most, least = information.index[-1], information.index[0]
    part = information.iloc[-1] / float(dataset["limit"].sel(operator=most)) if float(dataset["limit"].sel(operator=most)) else 0.0
    error = dataset["median_log_error"].to_series().dropna()
    text = f"A rank-1 second moment loses most in {most} ({information.iloc[-1]:.2g} nat, {part:.0%} of what is possible)"
    text += f" and least in {least} ({information.iloc[0]:.2g})" if most != least else ""
    largest = float(dataset["largest_error"].max())
    return f"{text}; single elements are off by {error.median():.2g} decades (RMS, median over operators), at most by {largest:.2g}."


def _with_maps(run: xr.DataTree, result: xr.Dataset, error: dict[str, float]) -> xr.Dataset:
    """`result` with the maps of the matrix of largest `error` that has them, if any has."""
    try:
        group = records(run, "second_moment_map")[["second_moment_map", "rank1_map"]].load()
    except (ValueError, KeyError):
        return result
    known = np.isfinite(group["rank1_map"].values).any(axis=-1)
    names = group["name"].values.tolist()
    candidates = [j for j, name in enumerate(names) if known[:, j].any() and np.isfinite(error.get(name, np.nan))]
    if not candidates:
        return result
    worst = max(candidates, key=lambda j: error[names[j]])
    last = int(np.flatnonzero(known[:, worst])[-1])
    one = group.isel(step=last, matrix=worst)
    shape = [min(int(one[side]), MAP_SIDE) for side in ("rows", "cols")]
    for name, source in (("map", "second_moment_map"), ("rank1_map", "rank1_map")):
        result[name] = (("row", "column"), one[source].values[: shape[0] * shape[1]].reshape(shape).astype(np.float64))
    return result.assign_attrs(matrix=names[worst], map_step=int(one["step"]))
