"""Does Adam's diagonal improve the conditioning of the Hessian's blocks, or hurt it? (Adam-mini, arXiv 2406.16793, Fig. 5)"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from ..by_operator import medians_by
from ..figures import axes, finish
from ..run import operators_of, recorded

QUESTION = "Does Adam's learning rate per coordinate improve the conditioning of the Hessian's blocks, or hurt it?"
READING = (
    "Every dot is the exact Hessian of one row of a matrix. Below the line at 1 Adam's diagonal makes the problem better conditioned, above it worse. "
    "Dark dots are Hessians far from diagonal, where a learning rate per coordinate has little to work with."
)
SHOWN = 2000  # dots at most


def study(run: xr.DataTree) -> xr.Dataset:
    """r = κ(D·H_b)/κ(H_b) for every exact block, with κ(H_b), τ and d; and the median r per operator.

    Variables: per block of every record `ratio`, `condition`, `dominance` τ, `size` d, with coordinates `block_operator` and `block_step`; per operator
    `median`, `median_low`, `median_high` (95 % over layers), `hurt` (share of its blocks with r > 1).

    Raises:
        ValueError: no block with an exact Hessian whose condition number its format carries.
    """
    how = (
        "no exact Hessian in it has a condition number that its format carries; call recorder.curvature(loss_fn, exact=256) from time to time, "
        "on a batch of more tokens than a row is long"
    )
    names = ("preconditioning_ratio", "preconditioning_condition", "preconditioning_dominance", "preconditioning_size")
    curvature = recorded(run, "curvature", *names, otherwise=how)
    ratio = curvature["preconditioning_ratio"].values
    step, matrix, block = np.nonzero(np.isfinite(ratio))
    operators, label = operators_of(curvature), curvature["operator"].values
    logs = curvature["preconditioning_ratio"].copy(data=np.log10(np.where(ratio > 0, ratio, np.nan)))
    bars = 10 ** medians_by(logs.median("block"), label, operators)
    own = ratio[step, matrix, block]
    hurt = [np.mean(own[label[matrix] == o] > 1) if (label[matrix] == o).any() else np.nan for o in operators]
    return xr.Dataset(
        {
            "ratio": ("block", own),
            "condition": ("block", curvature["preconditioning_condition"].values[step, matrix, block]),
            "dominance": ("block", curvature["preconditioning_dominance"].values[step, matrix, block]),
            "size": ("block", curvature["preconditioning_size"].values[step, matrix]),
            **{name: ("operator", values) for name, values in zip(("median_low", "median", "median_high"), bars, strict=True)},
            "hurt": ("operator", hurt),
        },
        coords={"operator": operators, "block_operator": ("block", label[matrix]), "block_step": ("block", curvature["step"].values[step])},
    )


def plot(dataset: xr.Dataset) -> Figure:
    """r over κ(H_b), and over the number of coordinates d; colour: τ."""
    table = dataset[["ratio", "condition", "dominance", "size"]].to_dataframe().reset_index(drop=True)
    if len(table) > SHOWN:
        table = table.sample(SHOWN, random_state=0)
    table["τ"] = table["dominance"]
    figure, panels = axes(2)
    for ax, x, text in (
        (panels[0], "condition", "condition number κ(H_b)"),
        (panels[1], "size", "coordinates d of the block"),
    ):
        sns.scatterplot(
            table,
            x=x,
            y="ratio",
            hue="τ",
            palette="viridis",
            legend="brief" if ax is panels[1] else False,
            linewidth=0,
            s=22,
            alpha=0.8,
            ax=ax,
        )
        ax.axhline(1, color="0.4", linewidth=0.8)
        finish(
            ax, title="Above 1 Adam's diagonal hurts; colour: diagonal dominance τ", x=text, y="r = κ(D·H_b)/κ(H_b)", log_x=True, log_y=True
        )
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    ratio = dataset["ratio"].values
    text = f"Adam's diagonal changes the condition number of a block's Hessian by a factor of {np.median(ratio):.2g} (median of {len(ratio)} blocks); it is worse for {np.mean(ratio > 1):.0%} of them"
    median = dataset["median"].to_series().dropna().sort_values()
    if len(median) > 1:
        text += f", best for {median.index[0]} ({median.iloc[0]:.2g}) and worst for {median.index[-1]} ({median.iloc[-1]:.2g})"
    return text + "."
