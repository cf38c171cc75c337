"""One look for all figures. Nothing global is touched: figures are objects, the style is a context."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from ..diagnostics.operators import OPERATORS

FEW = 12  # records that are marked one by one
STEP = "optimizer step"
WIDEST = 13.0  # inches: a page shrinks what is wider until its text cannot be read


def axes(panels: int = 1, *, width: float = 6.0, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes in the house style, each up to `width` wide: side by side, four and more in two rows."""
    rows = 1 if panels < 4 else 2
    columns = -(-panels // rows)
    with _style():
        figure = Figure(figsize=(min(width * columns, WIDEST), height * rows), dpi=130, layout="constrained")
        made = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in made[panels:]:
        unused.remove()
    return figure, made[:panels]


def operator_palette(operators: Sequence[str]) -> dict[str, Any]:
    """One colour per operator, the same in every figure; markers and order carry the difference too where it matters."""
    # Of paired palettes, light beside dark: neighbours in the table (q, k, v, …) get distinct dark colours first.
    colours = [*sns.color_palette("tab20"), *sns.color_palette("tab20b"), *sns.color_palette("tab20c")]
    order = [*range(0, len(colours), 2), *range(1, len(colours), 2)]
    palette = {operator: colours[order[i]] for i, operator in enumerate(OPERATORS)}
    own = [operator for operator in operators if operator not in palette]
    return palette | dict(zip(own, sns.color_palette("Set2", max(len(own), 1)), strict=False))


def finish(ax: Axes, *, title: str, x: str, y: str, log_x: bool = False, log_y: bool = False) -> None:
    """Title, axis labels with units, log axes, and the legend outside the data."""
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if x == STEP:  # there is no half a step
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    for log, axis, set_scale in ((log_x, ax.xaxis, ax.set_xscale), (log_y, ax.yaxis, ax.set_yscale)):
        if log:
            set_scale("log")
            _plain_ticks(axis)
    if (legend := ax.get_legend()) is not None:
        sns.move_legend(
            ax, "center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, title=legend.get_title().get_text() or None
        )


def _plain_ticks(axis: Axis) -> None:
    """Plain numbers on a log axis of less than two decades, where powers of ten are too few and all else crowds."""
    low, high = sorted(axis.get_view_interval())
    decades = float(np.log10(high / low)) if low > 0 else np.inf
    if decades < 2:
        axis.set_major_locator(MaxNLocator(5) if decades < 0.7 else LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def settle(figure: Figure) -> None:
    """Place everything in the figure now: `savefig` would draw it all once for that alone, at half the cost of saving."""
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def operator_lines(ax: Axes, dataset: xr.Dataset, name: str, *, legend: bool = True) -> None:
    """`name` (step, operator) over training, one line per operator, with a band from `name_lower` to `name_upper` where there are such."""
    operators = [str(o) for o in dataset["operator"].values]
    palette = operator_palette(operators)
    table = dataset[name].to_dataframe().reset_index()
    marker = "o" if dataset.sizes["step"] <= FEW else None  # a line through one point is not seen
    sns.lineplot(
        table,
        x="step",
        y=name,
        hue="operator",
        palette=palette,
        hue_order=operators,
        marker=marker,
        markersize=5,
        ax=ax,
        legend=legend,
        errorbar=None,
    )
    if f"{name}_lower" in dataset:
        for o in operators:
            one = dataset.sel(operator=o)
            low, high = one[f"{name}_lower"].values, one[f"{name}_upper"].values
            ax.fill_between(one["step"].values, low, high, color=palette[o], alpha=0.12, linewidth=0)


def intervals(
    ax: Axes,
    names: Sequence[str],
    bars: NDArray[np.float64],
    colours: Sequence[Any],
    *,
    label: str | None = None,
    offset: float = 0.0,
    **look: Any,
) -> None:
    """One mark per name, from the top down, with its error bar where there is one.

    Args:
        ax: the axes.
        names: of the rows.
        bars: lower end, value, upper end, shape (3, len(names)).
        colours: of the marks.
        label: in the legend, where the marks are grey.
        offset: downwards, in rows, so that two marks of one row do not cover each other.
        look: of `Axes.errorbar`: `marker`, `markerfacecolor`, `markersize`.
    """
    low, value, high = bars
    # A percentile interval need not hold the estimate itself.
    reach = np.stack([np.maximum(value - low, 0), np.maximum(high - value, 0)])
    style: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 6, "elinewidth": 1.4, "capsize": 0} | look
    for i, colour in enumerate(colours):
        ax.errorbar(value[i : i + 1], [i + offset], xerr=reach[:, i : i + 1], color=colour, **style)
    if label:
        ax.plot([], [], label=label, color="0.4", **{name: value for name, value in style.items() if name not in ("elinewidth", "capsize")})
    ax.set_yticks(np.arange(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)


def _style() -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = sns.axes_style("whitegrid", {"grid.color": "0.9", "axes.edgecolor": "0.6"})
    return context
