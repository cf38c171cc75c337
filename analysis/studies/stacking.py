"""Where would orthogonalising two layers together pay? (TEON, arXiv 2601.23261)

TEON orthogonalises matrices of K layers as one: side by side (mode 1, shared left singular vectors) or over each other (mode 2,
shared right ones). It equals the layers' own Muon up to 1/√K where their Gram matrices coincide, and can only gain where
their leading subspaces overlap more than random ones would and the stack is better conditioned than its parts.
"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from ...diagnostics.catalogue import SIDES
from ..by_operator import medians_by
from ..figures import axes, finish, intervals, operator_palette
from ..run import operators_of, recorded
from ..shape_null import null_log10_condition

QUESTION = "Would orthogonalising neighbouring layers together pay?"
READING = (
    "Left: every mark is a pair of matrices. Right of the dotted line, the two share at least twice as much of their leading directions "
    "as random matrices would; above zero, their stack has a smaller condition number than the worse of the two. Stacking can pay in the grey "
    "corner. Right: 0 means that stacking would change nothing, 1 that the two have nothing in common."
)

# Leading subspaces overlap well above chance from here on: overlap over that of random subspaces.
OVERLAP = 2.0
STACKED = {"left": "side by side", "right": "one over the other"}


def study(run: xr.DataTree) -> xr.Dataset:
    """Overlap of leading singular subspaces, distance of Gram matrices and κ of the stack, of the recorded pairs of matrices.

    Returns:
        Per pair and side, medians over the records (matrix, side): `overlap_ratio`, subspace overlap over that of random subspaces;
        `gram_distance`; `gain`, decades by which the stack's κ lies below the larger one of the pair. Per operator and side, medians over its pairs with
        95 % over layers: the same with `_median`, `_low`, `_high` at the end. `gain_of_shape` (operator, side): the gain that
        shape alone gives, since a stack of square matrices is no longer square; `pays` (operator, side): overlap at least twice
        that of random subspaces and a gain above zero, in the lower ends of both intervals where there are any. Side "left" stacks side
        by side, "right" over each other.

    Raises:
        ValueError: no group stacking in the run, or no pair in it has a spectrum.
    """
    reason = (
        "no two of its matrices were comparable in any record: stacking needs two layers with matrices of one shape, finite and not zero"
    )
    names = ("subspace_overlap", "subspace_overlap_null", "gram_distance", "stack_condition_gain")
    pairs = recorded(run, "stacking", *names, otherwise=reason).drop_attrs()
    ratio = pairs["subspace_overlap"] / pairs["subspace_overlap_null"]
    values = {"overlap_ratio": ratio, "gram_distance": pairs["gram_distance"], "gain": pairs["stack_condition_gain"]}
    operators, label = operators_of(pairs), pairs["operator"].values
    result = xr.Dataset(
        {name: value.where(np.isfinite(value)).median("step") for name, value in values.items()},
        coords={"of_operator": operators, "side": list(SIDES)},
    )
    for name, value in values.items():
        bars = np.stack([medians_by(value.isel(side=i), label, operators) for i in range(len(SIDES))], axis=-1)
        for i, suffix in enumerate(("low", "median", "high")):
            result[f"{name}_{suffix}"] = (("of_operator", "side"), bars[i])
    shapes = list(zip(pairs["rows"].values.tolist(), pairs["cols"].values.tolist(), strict=True))
    of_shape = [[np.median([_gain_of_shape(*shapes[j], side) for j in np.flatnonzero(label == o)]) for side in SIDES] for o in operators]
    result["gain_of_shape"] = (("of_operator", "side"), of_shape)
    sure = {
        name: result[f"{name}_low"].where(np.isfinite(result[f"{name}_low"]), result[f"{name}_median"])
        for name in ("overlap_ratio", "gain")
    }
    result["pays"] = (sure["overlap_ratio"] >= OVERLAP) & (sure["gain"] > 0)
    return result


def plot(dataset: xr.Dataset) -> Figure:
    """Left: gain in κ over overlap, one mark per pair and side. Right: distance of the Gram matrices, per operator and side."""
    operators = [str(o) for o in dataset["of_operator"].values]
    palette = operator_palette(operators)
    figure, (left, right) = axes(2)
    table = dataset[["overlap_ratio", "gain"]].to_dataframe().reset_index().replace({"side": STACKED})
    sns.scatterplot(
        table, x="overlap_ratio", y="gain", hue="operator", style="side", palette=palette, hue_order=operators, style_order=list(STACKED.values()),
        markers=["o", "s"], ax=left, s=26, linewidth=0.2, edgecolor="white",
    )  # fmt: skip
    known = table[np.isfinite(table["overlap_ratio"]) & (table["overlap_ratio"] > 0)]
    limits = min(known["overlap_ratio"].min(), OVERLAP) / 1.5, max(known["overlap_ratio"].max(), OVERLAP) * 1.5
    left.axvline(OVERLAP, color="0.4", linestyle=":", linewidth=1)
    left.axhline(0, color="0.4", linewidth=0.8)
    top = max(left.get_ylim()[1], 0.1)
    left.fill_between([OVERLAP, limits[1]], 0, top, color="0.5", alpha=0.12, linewidth=0)
    left.set_xlim(limits)
    left.set_ylim(top=top)
    finish(
        left, title="Pairs of matrices, medians over the records", x="overlap of leading directions over that of random ones",
        y="κ that stacking saves (decades)", log_x=True,
    )  # fmt: skip
    for i, side in enumerate(SIDES):
        one = dataset.sel(side=side)
        bars = np.stack([one[f"gram_distance_{end}"].values for end in ("low", "median", "high")])
        look = {"marker": "s", "markerfacecolor": "white"} if i else {}
        intervals(right, operators, bars, [palette[o] for o in operators], label=STACKED[side], offset=0.24 * i - 0.12, **look)
    right.set_xlim(0, max(right.get_xlim()[1], 0.1))
    right.legend()
    finish(right, title="How different the pairs are; bars: 95 % over layers", x="distance of their Gram matrices", y="operator")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    best = {side: dataset["gain_median"].sel(side=side).to_series() for side in SIDES}
    pays = [
        f"{o!s} {STACKED[side]} ({_numbers(dataset, str(o), side)})"
        for o in dataset["of_operator"].values
        for side in SIDES
        if bool(dataset["pays"].sel(of_operator=o, side=side))
    ]
    if pays:
        return f"Stacking pairs of layers can pay for {', '.join(pays)}."
    side = max(SIDES, key=lambda s: best[s].max())
    operator = best[side].idxmax()
    return (
        f"For no operator is it sure that pairs of layers share at least {OVERLAP:g} times the leading directions of random matrices and have a smaller κ when stacked; "
        f"{operator} {STACKED[side]} gains most ({_numbers(dataset, operator, side)})."
    )


def _numbers(dataset: xr.Dataset, operator: str, side: str) -> str:
    one = dataset.sel(of_operator=operator, side=side)
    return (
        f"{float(one['overlap_ratio_median']):.1f} times the overlap of random ones, κ smaller by {float(one['gain_median']):.2f} decades, "
        f"shape alone {float(one['gain_of_shape']):.2f}"
    )


def _gain_of_shape(rows: int, cols: int, side: str) -> float:
    """log10 κ of the worse of two Gaussian matrices of that shape over κ of their stack."""
    stack = (rows, 2 * cols) if side == "left" else (2 * rows, cols)
    return null_log10_condition(rows, cols, worst_of=2) - null_log10_condition(*stack)
