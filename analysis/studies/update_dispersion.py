"""Are the rows and columns of orthogonalised updates equally long? (NorMuon, arXiv 2510.05491)

Of an exact polar factor all rows are equally long on the short side; on the long side their squared norms are leverage scores, whose
coefficient of variation is √(2(m − n)/(n(m + 2))) for a random matrix with long side m and short side n.
"""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ...diagnostics.quantities.output_dispersion import dispersion_null
from ..by_operator import by_operator
from ..figures import axes, finish, intervals, operator_lines, operator_palette
from ..run import recorded

QUESTION = "Are the rows and columns of orthogonalised updates equally long?"
READING = (
    "Left: marks far to the right belong to updates that move some neurons much more than others; the thin strokes show what an "
    "exactly orthogonalised random matrix has. Rows beyond their stroke are what NorMuon evens out. Where the stroke is at zero, a "
    "mark away from it only measures how far from orthogonal the update is. Right: the same for rows over the training."
)


def study(run: xr.DataTree) -> xr.Dataset:
    """Coefficient of variation of the squared row and column norms of O, beside what an exact polar factor of a random matrix has.

    Returns:
        `row` and `column` as of `by_operator`; `row_null` and `column_null` (operator), medians over its shapes: 0 on the short side.

    Raises:
        ValueError: no geometry in the run, or O known of no matrix in it.
    """
    reason = "the orthogonalised update O is known of no matrix in it: no optimizer orthogonalises, or weights are too coarse to read O from them"
    geometry = recorded(run, "geometry", "row_dispersion", "column_dispersion", otherwise=reason).drop_attrs()
    result = by_operator({name: geometry[f"{name}_dispersion"] for name in ("row", "column")})
    rows, cols, label = geometry["rows"].values.tolist(), geometry["cols"].values.tolist(), geometry["operator"].values
    for name, shapes in (("row", zip(rows, cols, strict=True)), ("column", zip(cols, rows, strict=True))):
        null = np.array([dispersion_null(*shape) for shape in shapes])
        result[f"{name}_null"] = ("operator", [float(np.median(null[label == o])) for o in result["operator"].values])
    return result


def plot(dataset: xr.Dataset) -> Figure:
    """Left: rows and columns per operator, with the null as strokes. Right: rows over training."""
    operators = [str(o) for o in dataset["operator"].values]
    palette = operator_palette(operators)
    figure, (left, right) = axes(2)
    for i, axis in enumerate(("row", "column")):
        offset, look = 0.24 * i - 0.12, {"marker": "s", "markerfacecolor": "white"} if i else {}
        bars = np.stack([dataset[f"median_{axis}{suffix}"].values for suffix in ("_low", "", "_high")])
        intervals(left, operators, bars, [palette[o] for o in operators], label=f"{axis}s", offset=offset, **look)
        null = dataset[f"{axis}_null"].values
        intervals(
            left,
            operators,
            np.stack([null] * 3),
            ["0.2"] * len(operators),
            label=None if i else "exact, random",
            offset=offset,
            marker="|",
            markersize=11,
        )
    left.legend()
    finish(left, title="Dispersion of O's norms; bars: 95 % over layers", x="std / mean of squared norms", y="operator")
    operator_lines(right, dataset, "row")
    for o in operators:
        right.axhline(float(dataset["row_null"].sel(operator=o)), color=palette[o], linestyle=":", linewidth=1)
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
    finish(right, title="Rows, median; dotted: exact, of a random matrix", x="optimizer step", y="std / mean of squared row norms")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    rows, columns = (dataset[[f"median_{name}", f"{name}_null"]].to_dataframe().dropna() for name in ("row", "column"))
    rows["excess"], columns["excess"] = rows["median_row"] - rows["row_null"], columns["median_column"] - columns["column_null"]
    most, wide = rows["excess"].idxmax(), columns["excess"].idxmax()
    return (
        f"Squared row norms of O vary most beyond chance in {most}: by {rows['median_row'][most]:.3g} of their mean, where an exactly orthogonalised random matrix has "
        f"{rows['row_null'][most]:.3g}; column norms in {wide}: {columns['median_column'][wide]:.3g} against {columns['column_null'][wide]:.3g}."
    )
