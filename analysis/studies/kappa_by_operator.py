"""Which operators have ill-conditioned NS inputs, and how much of that is their shape? (AMO, Fig. 3b, 8, 12)"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from ..figures import axes, finish, operator_palette
from ..run import median_by, operators_of, spectra
from ..shape_null import null_log10_condition

QUESTION = "Which operators have ill-conditioned Newton–Schulz inputs, and how much of that is their shape?"
READING = (
    "Left: the higher a line, the more Newton–Schulz steps that kind of matrix needs; dotted lines show what random matrices of "
    "the same shape have. Right: what remains when the shape's own part is taken off; lines above zero are harder than their "
    "shape explains."
)


def study(run: xr.DataTree) -> xr.Dataset:
    """Median and quartiles of κ per operator over the run, beside what a Gaussian matrix of the same shape would have.

    Variables: `median`, `lower`, `upper` (quartiles of κ over the operator's matrices; dimensions step, operator), `null`
    (median κ of Gaussian matrices of its shapes; operator), `excess` (median of log10 κ − log10 κ_null, decades; step,
    operator), `floor_share` (share of its κ that are lower bounds; operator).

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
    excess = median_by(kappa.copy(data=np.log10(kappa.values) - null), label, operators)
    return xr.Dataset(
        {
            **quartiles,
            "excess": (("step", "operator"), excess),
            "null": ("operator", [10 ** float(np.median(null[label == o])) for o in operators]),
            "floor_share": ("operator", floor_share),
        },
        coords={"step": geometry["step"].values, "operator": operators},
    )


def plot(dataset: xr.Dataset) -> Figure:
    """Left: median κ and quartiles over training, dotted the shape-only null. Right: decades above that null."""
    operators = [str(o) for o in dataset["operator"].values]
    palette = operator_palette(operators)
    table = dataset[["median", "excess"]].to_dataframe().reset_index()
    figure, (left, right) = axes(2)
    for ax, y in ((left, "median"), (right, "excess")):
        sns.lineplot(table, x="step", y=y, hue="operator", palette=palette, hue_order=operators, ax=ax, legend=ax is right, errorbar=None)
    for o in operators:
        one = dataset.sel(operator=o)
        left.fill_between(one["step"].values, one["lower"].values, one["upper"].values, color=palette[o], alpha=0.12, linewidth=0)
        left.axhline(float(one["null"]), color=palette[o], linestyle=":", linewidth=1)
    finish(
        left,
        title="Median and quartiles; dotted: Gaussian matrices of the same shape",
        x="optimizer step",
        y="condition number κ of the NS input",
        log_y=True,
    )
    right.axhline(0, color="0.4", linewidth=0.8)
    finish(right, title="What shape does not explain", x="optimizer step", y="log10 κ − log10 κ of shape alone (decades)")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    overall = dataset["median"].median("step").to_series().dropna().sort_values()
    excess = dataset["excess"].median("step").to_series().dropna().sort_values()
    found, null = np.log10(overall.values), np.log10(dataset["null"].sel(operator=overall.index.tolist()).values)
    # Where all shapes are the same there is nothing that could correlate.
    comparable = len(overall) > 2 and min(np.ptp(found), np.ptp(null)) > 1e-6
    shape = f" Shape alone correlates {np.corrcoef(found, null)[0, 1]:.2f} with that ranking." if comparable else ""
    return (
        f"Hardest operator by median κ: {overall.index[-1]} ({overall.iloc[-1]:.3g}), easiest: {overall.index[0]} ({overall.iloc[0]:.3g}). "
        f"Above what its shape explains, {excess.index[-1]} is hardest ({excess.iloc[-1]:+.1f} decades).{shape}"
    )
