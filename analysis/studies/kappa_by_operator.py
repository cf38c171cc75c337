"""Which operators have ill-conditioned NS inputs, and how much of that is their shape? (AMO, Fig. 3b, 8, 12)"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from ...diagnostics.bootstrap import with_interval
from ..by_operator import medians_by
from ..figures import FEW, axes, finish, intervals, operator_palette
from ..run import median_by, operators_of, spectra
from ..shape_null import null_log10_condition

QUESTION = "Which operators have ill-conditioned Newton–Schulz inputs, and how much of that is their shape?"
READING = (
    "Left: the higher a line, the more Newton–Schulz steps that kind of matrix needs; dotted lines show what random matrices of "
    "the same shape have. Middle: what remains when the shape's own part is taken off; lines above zero are harder than their "
    "shape explains. Right: the whole run in one number each; operators whose bars overlap may differ by chance."
)


def study(run: xr.DataTree) -> xr.Dataset:
    """Median and quartiles of κ per operator over the run, beside what a Gaussian matrix of the same shape would have.

    Variables: `median`, `lower`, `upper` (quartiles of κ over the operator's matrices; dimensions step, operator), `null`
    (median κ of Gaussian matrices of its shapes; operator), `excess` (median of log10 κ − log10 κ_null, decades; step,
    operator), `floor_share` (share of its κ that are lower bounds; operator). `overall` and `overall_excess` (operator) are of κ and of that
    excess the median over matrices, each with its median over the records, with `_low` and `_high`, 95 % over layers.

    Raises:
        ValueError: no geometry in the run.
    """
    geometry = spectra(run).load()
    operators = operators_of(geometry)
    label = geometry["operator"].values
    null = np.array([null_log10_condition(int(m), int(n)) for m, n in zip(geometry["rows"].values, geometry["cols"].values, strict=True)])
    kappa = geometry["condition_number"]
    quartiles = {
        name: (("step", "operator"), median_by(kappa, label, operators, q))
        for name, q in (("lower", 0.25), ("median", 0.5), ("upper", 0.75))
    }
    recorded = np.isfinite(kappa.values)
    floors = (geometry["condition_is_floor"].values & recorded).sum(axis=0)
    floor_share = [floors[label == o].sum() / max(recorded[:, label == o].sum(), 1) for o in operators]
    above = kappa.copy(data=np.log10(kappa.values) - null)
    overall = {
        name + suffix: ("operator", bars)
        for name, values in (("overall", kappa), ("overall_excess", above))
        for suffix, bars in zip(("_low", "", "_high"), medians_by(values, label, operators), strict=True)
    }
    return xr.Dataset(
        {
            **quartiles,
            "excess": (("step", "operator"), median_by(above, label, operators)),
            "null": ("operator", [10 ** float(np.median(null[label == o])) for o in operators]),
            "floor_share": ("operator", floor_share),
            **overall,
        },
        coords={"step": geometry["step"].values, "operator": operators},
    )


def plot(dataset: xr.Dataset) -> Figure:
    """Left: median κ and quartiles over training, dotted the shape-only null. Middle: decades above that null. Right: κ over all records."""
    operators = [str(o) for o in dataset["operator"].values]
    palette = operator_palette(operators)
    table = dataset[["median", "excess"]].to_dataframe().reset_index()
    figure, (left, middle, right) = axes(3, width=5.2)
    of = {"hue": "operator", "palette": palette, "hue_order": operators, "marker": "o" if dataset.sizes["step"] <= FEW else None}
    for ax, y in ((left, "median"), (middle, "excess")):
        sns.lineplot(table, x="step", y=y, **of, ax=ax, legend=False, errorbar=None)
    for o in operators:
        one = dataset.sel(operator=o)
        left.fill_between(one["step"].values, one["lower"].values, one["upper"].values, color=palette[o], alpha=0.12, linewidth=0)
        left.axhline(float(one["null"]), color=palette[o], linestyle=":", linewidth=1)
    finish(
        left,
        title="Median and quartiles; dotted: Gaussian, same shape",
        x="optimizer step",
        y="condition number κ of the NS input",
        log_y=True,
    )
    middle.axhline(0, color="0.4", linewidth=0.8)
    finish(middle, title="What shape does not explain", x="optimizer step", y="log10 κ − log10 κ of shape alone (decades)")
    bars = np.stack([dataset[f"overall{suffix}"].values for suffix in ("_low", "", "_high")])
    null = np.stack([dataset["null"].values] * 3)
    intervals(right, operators, null, ["0.2"] * len(operators), label="Gaussian, same shape", marker="|", markersize=11)
    intervals(right, operators, bars, [palette[o] for o in operators])
    right.legend()
    finish(right, title="Median over all records; bars: 95 % over layers", x="condition number κ", y="operator", log_x=True)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, fontsize=8)
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    overall = dataset["overall"].to_series().dropna().sort_values()
    excess = dataset["overall_excess"].to_series().dropna().sort_values()
    found, null = np.log10(overall.values), np.log10(dataset["null"].sel(operator=overall.index.tolist()).values)
    # Where all shapes are the same there is nothing that could correlate.
    comparable = len(overall) > 2 and min(np.ptp(found), np.ptp(null)) > 1e-6
    shape = f" Shape alone correlates {np.corrcoef(found, null)[0, 1]:.2f} with that ranking." if comparable else ""
    hardest, easiest = (_told(dataset, "overall", o, ".3g") for o in (overall.index[-1], overall.index[0]))
    above = _told(dataset, "overall_excess", excess.index[-1], "+.1f")
    if len(overall) == 1:
        return f"Median κ of {overall.index[0]}: {hardest}; in decades above what its shape explains: {above}."
    return (
        f"Hardest operator by median κ: {overall.index[-1]}, {hardest}; easiest: {overall.index[0]}, {easiest}. "
        f"Above what its shape explains, {excess.index[-1]} is hardest, in decades by {above}.{shape}"
    )


def _told(dataset: xr.Dataset, name: str, operator: str, spec: str) -> str:
    value, low, high = (float(dataset[name + suffix].sel(operator=operator)) for suffix in ("", "_low", "_high"))
    return with_interval(value, low, high, spec)
