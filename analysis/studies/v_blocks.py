"""Can blocks of coordinates share one learning rate? (Adam-mini, arXiv 2406.16793, Algorithms 1–3)

Adam-mini keeps one v per block: a head's rows of the query and key projections, an output row elsewhere, a token of the embedding. With
τ² = Var(ln v) within a block, log-normal v and m ∼ N(0, v), the update with the block's mean has a cosine of e^{−τ²/8} with Adam's.
"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from ..by_operator import median_and_extremes, medians_by
from ..figures import axes, finish, operator_palette
from ..run import operators_of, recorded

QUESTION = "Can the coordinates of a head, a neuron or a token share one learning rate?"
READING = (
    "Left: how unequal the second moment is inside a block; near zero, one learning rate per block loses nothing. Middle: above one, "
    "blocks differ more from each other than coordinates do inside of them, so that the partition is well chosen. Right: how close the "
    "update with a learning rate per block comes to Adam's; the curve is what the dispersion alone would make of it."
)

QUANTITIES = {
    "dispersion": "block_dispersion",
    "variance_ratio": "block_variance_ratio",
    "cv2": "block_cv2",
    "step_ratio": "block_step_ratio",
}


def study(run: xr.DataTree) -> xr.Dataset:
    """Dispersion of v inside the blocks of Adam-mini, between against within blocks, and what a learning rate per block makes of the update.

    Variables, of every matrix its median over the records (matrix): `dispersion` τ = std(ln v), `variance_ratio` (Var of block means of
    ln v over the mean within-block variance), `cv2` (Var(v)/mean(v)²), `step_ratio` (mean of √(mean_b v/v)), `cosine` with Adam's update,
    and `partition`; and per operator `median_dispersion` and `median_cosine` with `_low` and `_high`, 95 % over layers.

    Raises:
        ValueError: no second moments of all coordinates in the run.
    """
    reason = "no optimizer in it keeps a second moment of every coordinate (Adam does), so there are no blocks to compare"
    moment = recorded(run, "second_moment", *QUANTITIES.values(), "block_cosine", "block_partition", otherwise=reason)
    partitions = np.array([*moment.attrs["partitions"], "unknown"])[moment["block_partition"].values.max(axis=0)]
    moment = moment.drop_attrs()
    values = {name: moment[quantity] for name, quantity in QUANTITIES.items()}
    values["cosine"] = moment["block_cosine"].sel(statistic="mean", drop=True)
    result = xr.Dataset({name: value.where(np.isfinite(value)).median("step") for name, value in values.items()})
    result["partition"] = ("matrix", partitions)
    operators = operators_of(moment)
    for name in ("dispersion", "cosine"):
        bars = medians_by(values[name], moment["operator"].values, operators)
        result = result.assign({f"median_{name}{suffix}": ("kind", row) for suffix, row in zip(("_low", "", "_high"), bars, strict=True)})
    return result.assign_coords(kind=operators)


def plot(dataset: xr.Dataset) -> Figure:
    """Boxes of τ and of the between/within ratio per operator; cosine over τ with the law of log-normal v."""
    operators = operators_of(dataset)
    palette = operator_palette(operators)
    table = dataset[["dispersion", "variance_ratio", "cosine", "partition"]].to_dataframe().reset_index()
    blocks = table.groupby("operator")["partition"].first()
    between = bool((table["variance_ratio"] > 0).any())
    figure, panels = axes(2 + between, width=5.4)
    for ax, x in zip(panels, ("dispersion", "variance_ratio")[: 1 + between], strict=False):
        # A matrix that is one block has no between.
        shown = table[np.isfinite(table[x]) & ((table[x] > 0) | (x == "dispersion"))]
        own = [o for o in operators if o in set(shown["operator"])]
        boxes = ax.boxplot(
            [shown[x][shown["operator"] == o] for o in own], positions=range(len(own)), orientation="horizontal", widths=0.6, showfliers=False,
            patch_artist=True, medianprops={"color": "0.3"},
        )  # fmt: skip
        for box, o in zip(boxes["boxes"], own, strict=True):
            box.set(facecolor=palette[o], alpha=0.35)
        sns.stripplot(shown, x=x, y="operator", hue="operator", order=own, hue_order=own, palette=palette, legend=False, size=4, ax=ax)
        ax.set_yticks(range(len(own)), [f"{o} ({blocks[o]})" for o in own])
    panels[0].set_xlim(left=0)
    finish(
        panels[0], title="Dispersion inside a block; one point per matrix", x="τ = std of ln v in a block (nat)", y="operator (its blocks)"
    )
    if between:
        panels[1].axvline(1, color="0.4", linewidth=0.8)
        finish(
            panels[1],
            title="Blocks against coordinates",
            x="variance of ln v between over within blocks",
            y="",
            log_x=True,
        )
    right = panels[-1]
    tau = np.linspace(0, max(1.0, 1.05 * float(np.fmax.reduce(table["dispersion"]))), 100)
    right.plot(tau, np.exp(-(tau**2) / 8), color="0.4", linestyle=":", label="e^{−τ²/8}, log-normal v")
    sns.scatterplot(table, x="dispersion", y="cosine", hue="operator", hue_order=operators, palette=palette, s=26, ax=right)
    right.set_ylim(min(0.5, float(np.fmin.reduce(table["cosine"])) - 0.05) if np.isfinite(table["cosine"]).any() else 0, 1.02)
    finish(right, title="What a learning rate per block makes of the update", x="τ (nat)", y="cosine with Adam's update")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    text = f"Within blocks ln v scatters by τ = {median_and_extremes(dataset['median_dispersion'].to_series(), '.2g')} nat"
    ratio = dataset["variance_ratio"].values
    if np.isfinite(ratio).any():
        text += f"; {int((ratio > 1).sum())} of {int(np.isfinite(ratio).sum())} matrices differ more between blocks than within"
    cosine = dataset["median_cosine"].to_series()
    if not cosine.notna().any():
        return f"{text}."
    return f"{text}. One learning rate per block keeps a cosine of {median_and_extremes(cosine, '.2g')} with Adam's update."
