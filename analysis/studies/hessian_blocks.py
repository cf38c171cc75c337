"""Is the Hessian of a matrix made of Adam-mini's blocks? (Adam-mini, arXiv 2406.16793, Figs. 3–4)"""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ..by_operator import medians_by
from ..figures import axes, finish, intervals, operator_palette
from ..run import operators_of, recorded

QUESTION = "Is the Hessian of a matrix made of the blocks that Adam-mini gives one learning rate each?"
READING = (
    "Left: a mark at 1 means that all of the Hessian lies inside the blocks; the stroke is where it would lie if entries were spread evenly. "
    "Marks far right of their stroke speak for one learning rate per block. Right, where an exact Hessian was taken: dark is large; "
    "thin lines part the rows of the matrix, and dark squares along the diagonal are blocks."
)


def study(run: xr.DataTree) -> xr.Dataset:
    """Share of ‖H‖_F² inside the blocks, beside the share that blocks of that size have of an even matrix.

    Variables: `share`, `share_low`, `share_high` (operator): median over matrices and 95 % over layers; `error` (operator): median standard
    error of one matrix's share by its probes; `null` (operator); `map` (row, column): log10 of mean |H_ij| over tiles of the exact Hessian
    of consecutive rows of one matrix, named in `map_of` with `map_rows` rows, where one was recorded: the last of the operator whose share
    exceeds its null most.

    Raises:
        ValueError: no share inside blocks in the run.
    """
    names = (
        "hessian_in_block_share",
        "hessian_in_block_null",
        "hessian_in_block_error",
        "hessian_map",
        "preconditioning_size",
        "preconditioning_dominance",
    )
    how = "no share inside blocks was measured; call recorder.curvature(loss_fn, block_probes=4) from time to time"
    curvature = recorded(run, "curvature", *names, otherwise=how)
    operators, label = operators_of(curvature), curvature["operator"].values
    low, share, high = medians_by(curvature[names[0]], label, operators)
    null, error = (medians_by(curvature[name], label, operators)[1] for name in names[1:3])
    result = xr.Dataset(
        {
            name: ("operator", values)
            for name, values in (("share", share), ("share_low", low), ("share_high", high), ("null", null), ("error", error))
        },
        coords={"operator": operators},
    )
    maps = curvature["hessian_map"].values
    there = np.argwhere(~np.isnan(maps).all(axis=-1))
    if not len(there):
        return result
    excess = {o: value for o, value in zip(operators, share / null, strict=True)}
    step, matrix = max(map(tuple, there.tolist()), key=lambda at: (np.nan_to_num(excess[str(label[at[1]])]), at[0]))
    tiles = maps[step, matrix]
    side = round(np.sqrt(np.count_nonzero(~np.isnan(tiles))))
    rows = int(np.isfinite(curvature["preconditioning_dominance"].values[step, matrix]).sum())
    result["map"] = (("row", "column"), tiles[: side * side].reshape(side, side))
    return result.assign_attrs(map_of=str(curvature["name"].values[matrix]), map_rows=max(rows, 1))


def plot(dataset: xr.Dataset) -> Figure:
    """Left: share per operator with its null. Right: a map of an exact Hessian, where there is one."""
    operators = [str(o) for o in dataset["operator"].values]
    palette = operator_palette(operators)
    figure, panels = axes(2 if "map" in dataset else 1, height=max(4.2, 0.34 * len(operators) + 1.4))
    bars = np.stack([dataset[name].values for name in ("share_low", "share", "share_high")])
    # Where there are too few layers, the probes' own error stands for the interval.
    error = np.nan_to_num(dataset["error"].values)
    bars[0], bars[2] = np.where(np.isnan(bars[0]), bars[1] - 2 * error, bars[0]), np.where(np.isnan(bars[2]), bars[1] + 2 * error, bars[2])
    intervals(panels[0], operators, bars, [palette[o] for o in operators])
    intervals(panels[0], operators, np.stack([dataset["null"].values] * 3), ["0.2"] * len(operators), marker="|", markersize=12)
    panels[0].set_xlim(-0.03, 1.05)
    finish(panels[0], title="Median and 95 % over layers; strokes: an even matrix", x="share of ‖H‖_F² inside the blocks", y="operator")
    if "map" in dataset:
        ax, tiles = panels[1], dataset["map"].values
        finite = tiles[np.isfinite(tiles)]
        top = float(finite.max()) if len(finite) else 0.0
        shown = np.clip(np.where(np.isnan(tiles), -np.inf, tiles), top - 3, None)
        side, rows = len(tiles), int(dataset.attrs["map_rows"])
        ax.imshow(shown, cmap="Blues", vmin=top - 3, vmax=top, extent=(0, rows, rows, 0), interpolation="nearest")
        for k in range(1, rows):
            ax.axhline(k, color="0.5", linewidth=0.6)
            ax.axvline(k, color="0.5", linewidth=0.6)
        ax.grid(visible=False)
        ax.set_xticks(range(rows + 1))
        ax.set_yticks(range(rows + 1))
        title = f"{dataset.attrs['map_of']}: exact |H| in {side}×{side} tiles,\nwhite to dark: three decades up to {10**top:.1g}"
        finish(ax, title=title, x="coordinates, by row of the matrix", y="coordinates, by row of the matrix")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    share = dataset["share"].to_series().dropna().sort_values()
    null = dataset["null"].to_series()
    best, least = share.index[-1], share.index[0]
    text = f"Inside Adam-mini's blocks lie {share.iloc[-1]:.0%} of ‖H‖_F² for {best} ({null[best]:.1%} if spread evenly)"
    return text + (f" and {share.iloc[0]:.0%} for {least} ({null[least]:.1%})." if len(share) > 1 else ".")
