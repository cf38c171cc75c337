"""One look for all figures. Nothing global is touched: figures are objects, the style is a context."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..diagnostics.operators import OPERATORS


def axes(columns: int = 1, *, width: float = 6.0, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure with `columns` axes side by side in the house style."""
    with _style():
        figure = Figure(figsize=(width * columns, height), dpi=130, layout="constrained")
        return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def operator_palette(operators: Sequence[str]) -> dict[str, Any]:
    """One colour per operator, the same in every figure; markers and order carry the difference too where it matters."""
    colours = sns.color_palette("tab20", len(OPERATORS))
    # Neighbours in the table (q, k, v, …) get the distinct dark colours of the paired palette first.
    order = [*range(0, len(OPERATORS), 2), *range(1, len(OPERATORS), 2)]
    palette = {operator: colours[order[i]] for i, operator in enumerate(OPERATORS)}
    own = [operator for operator in operators if operator not in palette]
    return palette | dict(zip(own, sns.color_palette("Set2", max(len(own), 1)), strict=False))


def finish(ax: Axes, *, title: str, x: str, y: str, log_x: bool = False, log_y: bool = False) -> None:
    """Title, axis labels with units, log axes, and the legend outside the data."""
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if log_x:
        ax.set_xscale("log")
    if log_y:
        ax.set_yscale("log")
    if (legend := ax.get_legend()) is not None:
        sns.move_legend(
            ax, "center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, title=legend.get_title().get_text() or None
        )


def _style() -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = sns.axes_style("whitegrid", {"grid.color": "0.9", "axes.edgecolor": "0.6"})
    return context
