"""From which statistic of v should a block's one learning rate be made? (Adam-mini, arXiv 2406.16793, Fig. 15)

The paper trains with each and finds the mean best; here it is the cosine of each one's update with Adam's, on the run's own moments,
without any training.
"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from ..by_operator import medians_by
from ..figures import axes, finish
from ..run import operators_of, recorded

QUESTION = "From which statistic of a block's second moment should its one learning rate be made?"
READING = (
    "The higher a bar, the closer the update comes to Adam's own when each block gets one learning rate, made from that statistic of its "
    "second moment. An operator of which every matrix is a single block has four equal bars: there the choice only scales the step."
)

ALIKE = 1e-4  # cosines that differ by less are the same


def study(run: xr.DataTree) -> xr.Dataset:
    """Cosine of m/√v and m/√s_b, s_b being mean, max, min or norm (‖v‖₂) of v over the block, per operator.

    Variables (operator, statistic): `cosine`, the median over the operator's matrices of a matrix's median over records, with
    `cosine_low` and `cosine_high`, 95 % over layers; `best` (operator), the statistic of the largest, "none" where all are the same.

    Raises:
        ValueError: no first and second moments of all coordinates in the run.
    """
    reason = "no optimizer in it keeps a first and a second moment of every coordinate (Adam does), so there is no update to come close to"
    cosine = recorded(run, "second_moment", "block_cosine", otherwise=reason)["block_cosine"].drop_attrs()
    operators, statistics = operators_of(cosine.to_dataset(name="cosine")), [str(s) for s in cosine["statistic"].values]
    bars = np.stack([medians_by(cosine.sel(statistic=s), cosine["operator"].values, operators) for s in statistics], axis=-1)
    with np.errstate(invalid="ignore"):
        ranked = np.where(np.isfinite(bars[1]), bars[1], -np.inf)
        alike = ~(ranked.max(axis=1) - ranked.min(axis=1) > ALIKE)
    best = np.where(alike, "none", np.array(statistics)[ranked.argmax(axis=1)])
    return xr.Dataset(
        {
            **{f"cosine{suffix}": (("operator", "statistic"), b) for suffix, b in zip(("_low", "", "_high"), bars, strict=True)},
            "best": ("operator", best),
        },
        coords={"operator": operators, "statistic": statistics},
    )


def plot(dataset: xr.Dataset) -> Figure:
    """A bar per operator and statistic, with its interval over layers."""
    operators, statistics = ([str(v) for v in dataset[name].values] for name in ("operator", "statistic"))
    figure, (ax,) = axes(width=max(6.0, 2.4 + 0.95 * len(operators)))
    width = 0.8 / len(statistics)
    for i, (statistic, colour) in enumerate(zip(statistics, sns.color_palette("deep"), strict=False)):
        low, value, high = (dataset[f"cosine{suffix}"].sel(statistic=statistic).values for suffix in ("_low", "", "_high"))
        # A percentile interval need not hold the estimate itself.
        reach = np.stack([np.maximum(value - low, 0), np.maximum(high - value, 0)])
        place = np.arange(len(operators)) + (i - (len(statistics) - 1) / 2) * width
        ax.bar(place, value, width * 0.92, color=colour, label=statistic)
        ax.errorbar(place, value, yerr=reach, color="0.25", linestyle="none", elinewidth=1)
    ax.set_xticks(range(len(operators)), operators, rotation=30 if len(operators) > 6 else 0)
    ax.set_ylim(
        min(0.0, float(dataset["cosine_low"].min()) if dataset["cosine_low"].notnull().any() else 0.0, float(dataset["cosine"].min())), 1.0
    )
    ax.grid(visible=False, axis="x")
    ax.legend(title="statistic of v")
    finish(
        ax,
        title="One rate per block, from a statistic of v"
        + ("; whiskers: 95 % over layers" if dataset["cosine_low"].notnull().any() else ""),
        x="operator",
        y="cosine with Adam's update",
    )
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    medians = dataset["cosine"].median("operator").to_series()
    values = ", ".join(f"{name} {value:.2f}" for name, value in medians.items())
    best = dataset["best"].values[dataset["best"].values != "none"].tolist()
    if not best:
        return f"Cosine with Adam's update, median over operators: {values}; all statistics do the same (one block, or equal blocks)."
    winner = max(dict.fromkeys(best), key=best.count)
    return f"Cosine with Adam's update, median over operators: {values}; {winner} is best in {best.count(winner)} of {len(best)} operators whose blocks tell them apart."
