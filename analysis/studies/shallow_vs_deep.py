"""Do shallow and deep layers of one operator go different ways? (AMO, Fig. 10, 14)"""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.bootstrap import interval, resampled, with_interval
from ...diagnostics.nan_quantile import nan_quantile
from ...diagnostics.store.run_error import RunError
from ..figures import FEW, axes, finish, intervals, operator_palette
from ..run import median_by, operators_of, spectra

QUESTION = "Do shallow and deep layers of one operator go different ways?"
Matrices = tuple[NDArray[np.float64], NDArray[np.int64]]  # a number of each and its layer

READING = (
    "Left: solid and dashed lines of one colour are the first and the last layers of the same operator. Where they part, one schedule "
    "for the whole operator suits only one of them. Right: how far apart they are; a bar across zero says that layers differ as much among themselves."
)


def study(run: xr.DataTree, operators: Sequence[str] | None = None) -> xr.Dataset:
    """Median κ over the first and the last third of the layers, for chosen operators.

    Args:
        run: as from `open_run`.
        operators: which; by default the ones with the largest and the smallest median κ.

    Returns:
        `median` (step, depth, operator), depth being "shallow" or "deep"; `difference` (operator), median log10 κ of the deep less that of the
        shallow matrices in decades, a matrix counting once with its median over the records, with `difference_low` and `difference_high`, 95 %
        over the layers of both, drawn apart; missing with fewer than three layers to a third.

    Raises:
        ValueError: no spectra, none of an operator in both thirds, or an operator of which that holds.
    """
    geometry = spectra(run)[["condition_number"]].load()
    layer, label = geometry["layer"].values, geometry["operator"].values
    third = max(1, (int(layer.max()) + 1) // 3)
    depth = np.where((layer >= 0) & (layer < third), "shallow", np.where(layer > layer.max() - third, "deep", "middle"))
    keys = np.array([f"{d} {o}" for d, o in zip(depth, label, strict=True)])
    depths = ("shallow", "deep")

    def medians(chosen: Sequence[str]) -> NDArray[np.float64]:
        return np.stack([median_by(geometry["condition_number"], keys, [f"{d} {o}" for o in chosen]) for d in depths], axis=1)

    present = operators_of(geometry)
    known = np.asarray(np.isfinite(medians(present)).all(axis=1).any(axis=0))
    comparable = [o for o, both in zip(present, known, strict=True) if both]
    if not comparable:
        raise RunError("no operator has spectra both in shallow and in deep layers (layers are found by the matrices' names)")
    if operators is None:
        overall = [float(np.nanmedian(geometry["condition_number"].values[:, label == o])) for o in comparable]
        operators = list(dict.fromkeys([comparable[int(np.argmax(overall))], comparable[int(np.argmin(overall))]]))
    if missing := set(operators) - set(comparable):
        raise ValueError(f"operators: {', '.join(sorted(missing))} not in shallow and deep layers of this run; {', '.join(comparable)} are")
    per_matrix = nan_quantile(np.log10(geometry["condition_number"].values).T)
    bars = np.array([_difference(*((per_matrix[keys == f"{d} {o}"], layer[keys == f"{d} {o}"]) for d in depths)) for o in operators]).T
    differences = {f"difference{suffix}": ("operator", row) for suffix, row in zip(("_low", "", "_high"), bars, strict=True)}
    return xr.Dataset(
        {"median": (("step", "depth", "operator"), medians(operators)), **differences},
        coords={"step": geometry["step"].values, "depth": list(depths), "operator": list(operators)},
        attrs={"layers_per_third": third},
    )


def _difference(shallow: Matrices, deep: Matrices) -> tuple[float, float, float]:
    """Lower end, value and upper end of the difference of two medians; NaN ends where either has too few layers."""
    value = float(nan_quantile(deep[0]) - nan_quantile(shallow[0]))
    # Two sets of layers, independent of each other: two seeds.
    drawn = [nan_quantile(resampled(*part, seed)) for seed, part in enumerate((shallow, deep))]
    if not all(len(d) for d in drawn):
        return np.nan, value, np.nan
    low, high = interval(drawn[1] - drawn[0])
    return float(low), value, float(high)


def plot(dataset: xr.Dataset) -> Figure:
    """Left: paired lines, colour by operator, dashes for deep layers. Right: their difference with its error bar."""
    operators = [str(o) for o in dataset["operator"].values]
    table = dataset["median"].to_dataframe().reset_index()
    figure, (ax, right) = axes(2)
    sns.lineplot(
        table,
        x="step",
        y="median",
        hue="operator",
        style="depth",
        palette=operator_palette(operators),
        hue_order=operators,
        marker="o" if dataset.sizes["step"] <= FEW else None,
        ax=ax,
        errorbar=None,
    )
    thirds = dataset.attrs["layers_per_third"]
    finish(
        ax,
        title="First against last layer" if thirds == 1 else f"First against last {thirds} layers",
        x="optimizer step",
        y="condition number κ of the NS input",
        log_y=True,
    )
    bars = np.stack([dataset[f"difference{suffix}"].values for suffix in ("_low", "", "_high")])
    intervals(right, operators, bars, [operator_palette(operators)[o] for o in operators])
    right.axvline(0, color="0.4", linewidth=0.8)
    title = "Deep against shallow" + ("; bars: 95 % over layers" if np.isfinite(bars[0]).any() else "")
    finish(right, title=title, x="log10 κ deep − log10 κ shallow (decades)", y="operator")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    parts = []
    bars = zip(*(dataset[f"difference{suffix}"].values for suffix in ("", "_low", "_high")), strict=True)
    for operator, (value, low, high) in zip(dataset["operator"].values, bars, strict=True):
        chance = "" if not np.isfinite(low) else ", which may be chance" if low <= 0 <= high else ", which excludes zero"
        parts.append(f"{operator!s} {with_interval(value, low, high, '+.2f')}{chance}")
    few = (
        ""
        if np.isfinite(dataset["difference_low"].values).any()
        else " With fewer than three layers to a third, what is chance is not known."
    )
    return f"Deep over shallow layers, decades of κ (median over records): {'; '.join(parts)}.{few}"
