"""Are update sizes what they are meant to be? (AdaMuon Eq. 9–10, Moonlight arXiv 2502.16982)

With ΔW = −η·s·O and O of rank r, a = RMS(ΔW/η)/(s/√max(m, n)) satisfies a² = mean_i o_i² for every scaling s, so that
|a² − 1| ≤ ε̃: the residual bounds how far an update's size may lie from its target, and a size outside that bound has
another cause (a factor missing or applied twice).
"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.bootstrap import median_interval, with_interval
from ...diagnostics.evenly_spread import evenly_spread
from ...diagnostics.nan_quantile import nan_quantile
from ...diagnostics.quantities.update_alignment import explained, is_readable, known_size, split_excess
from ...diagnostics.quantities.update_size import ADAMW_RMS
from ..by_operator import medians_by
from ..figures import FEW, axes, finish, intervals, operator_palette
from ..run import ns_schedules, operators_of, own_residual, ranks, whole_records

QUESTION = "Are update sizes what they are meant to be?"
READING = (
    "Left: 1 means that updates have exactly the size an ideal orthogonalisation would give them; black bars are 95 % over layers. Middle: size of an "
    "update per unit of learning rate; 0.2 is what AdamW usually has, so that matrices near 0.2 can share AdamW's learning rate. Right: the same "
    "over all records; operators whose bars lie apart differ by more than their layers do."
)

DRAWN = 64  # records
SPLIT = 64  # records whose spectra are taken through the iteration
ENDS = ("_low", "", "_high")


def study(run: xr.DataTree) -> xr.Dataset:
    """Update RMS per learning rate against its own target and against AdamW's 0.2.

    Variables (step, matrix): `update_rms_per_lr` (of the update that the optimizer intended, where weights are too coarse to tell it
    and that was recorded); `alignment` a (missing without orthogonalisation); `to_adamw` (RMS over
    0.2, the size that lets a learning rate be shared with AdamW); `residual` ε̃ predicted for the steps in force;
    `under_lifted` and `band`, which add up to the predicted a² − 1, of at most 64 evenly spread records (attributes `split_records` of
    `records`) and missing in the others, as each spectrum is mapped anew; `off_target`: a outside √(1 ± ε̃) by more than 2 %,
    where the update could be read back (rounding noise up to 0.01) or the intended one is known. Medians over matrices, each with its
    median over the records, with `_low` and `_high`, 95 % over layers: `median_alignment` and `median_update_rms_per_lr` (of_operator),
    `median_to_adamw` (of_optimizer), and `overall_alignment` of all that are orthogonalised.

    Raises:
        ValueError: no update records.
    """
    update = whole_records(run, "update")
    # Without its texts, which would go on to what is computed from it.
    applied = update["update_rms_per_lr"].drop_attrs()
    intended = update["update_rms_intended"].drop_attrs() if "update_rms_intended" in update else xr.full_like(applied, np.nan)
    per_lr = applied.copy(data=known_size(applied, intended))
    alignment = per_lr / update["update_rms_target"].drop_attrs()
    result = xr.Dataset({"update_rms_per_lr": per_lr, "alignment": alignment, "to_adamw": per_lr / ADAMW_RMS})
    result = result.assign(_medians(result))
    missing = xr.full_like(per_lr, np.nan)
    result = result.assign(residual=missing, under_lifted=missing.copy(), band=missing.copy(), off_target=xr.zeros_like(per_lr, dtype=bool))
    if "geometry" not in run.children or not run["geometry"].sizes.get("step"):
        return result
    geometry = whole_records(run, "geometry")
    # A run may have been continued with other groups: only records and matrices that both groups have.
    _, steps, steps_there = np.intersect1d(update["step"].values, geometry["step"].values, return_indices=True)
    _, here, there = np.intersect1d(update["name"].values, geometry["name"].values, return_indices=True)
    geometry = geometry.isel(step=steps_there, matrix=there)
    result["residual"].values[np.ix_(steps, here)] = own_residual(geometry).values
    few = evenly_spread(len(steps), SPLIT)
    kept = geometry.isel(step=few)
    split = split_excess(kept["sigma_quantile"].values, kept["ns_schedule"].values, ns_schedules(geometry), ranks(geometry))
    for name, values in zip(("under_lifted", "band"), split, strict=True):
        result[name].values[np.ix_(steps[few], here)] = values
    result.attrs |= {"split_records": len(few), "records": len(steps)}
    lower, upper = explained(result["residual"])
    outside = (result["alignment"] > upper) | (result["alignment"] < lower)
    result["off_target"] = outside & is_readable(update["update_noise"], intended)
    return result


def _medians(result: xr.Dataset) -> xr.Dataset:
    """What a matrix has in the median over its records, per operator, per optimizer and in all, with error bars."""
    operators, optimizers = operators_of(result), np.unique(result["optimizer"].values).tolist()
    found = xr.Dataset(coords={"of_operator": operators, "of_optimizer": optimizers})
    for name, of, order in (
        ("alignment", "operator", operators),
        ("update_rms_per_lr", "operator", operators),
        ("to_adamw", "optimizer", optimizers),
    ):
        for suffix, bars in zip(ENDS, medians_by(result[name], result[of].values, order), strict=True):
            found[f"median_{name}{suffix}"] = (f"of_{of}", bars)
    a = nan_quantile(np.where(np.isfinite(result["alignment"]), result["alignment"], np.nan).T)
    known = np.isfinite(a)
    low, high = median_interval(a[known], result["layer"].values[known])
    for suffix, value in zip(ENDS, (low, float(nan_quantile(a)), high), strict=True):
        found[f"overall_alignment{suffix}"] = value
    return found


def plot(dataset: xr.Dataset) -> Figure:
    """Left: a per operator, at most 64 evenly spread records. Middle: update RMS per learning rate over training, with AdamW's 0.2. Right: in all."""
    operators = operators_of(dataset)
    palette = operator_palette(operators)
    drawn = dataset.isel(step=evenly_spread(dataset.sizes["step"], DRAWN))
    table = drawn[["alignment", "update_rms_per_lr"]].to_dataframe().reset_index()
    aligned = table.dropna(subset=["alignment"])
    several = len(set(table["optimizer"])) > 1
    figure, (left, middle, right) = axes(3, width=5.2)
    if len(aligned):
        present = [o for o in operators if o in set(aligned["operator"])]
        bars = _bars(dataset.sel(of_operator=present), "median_alignment")
        sns.violinplot(
            aligned,
            x="operator",
            y="alignment",
            hue="operator",
            order=present,
            hue_order=present,
            palette=palette,
            cut=0,
            inner=None,
            linewidth=0.8,
            density_norm="width",
            legend=False,
            ax=left,
        )
        reach = np.stack([np.maximum(bars[1] - bars[0], 0), np.maximum(bars[2] - bars[1], 0)])
        left.errorbar(
            range(len(present)), bars[1], yerr=reach, fmt="o", color="black", markersize=4, markerfacecolor="white", elinewidth=1.2
        )
        left.tick_params(axis="x", rotation=40)
    left.axhline(1, color="0.4", linewidth=0.8)
    finish(left, title="1 = the size an exact polar factor would have", x="", y="alignment a = RMS(ΔW/lr) / target")
    sns.lineplot(
        table,
        x="step",
        y="update_rms_per_lr",
        hue="operator",
        style="optimizer",
        palette=palette,
        hue_order=operators,
        estimator="median",
        errorbar=None,
        marker="o" if dataset.sizes["step"] <= FEW else None,
        legend=several,
        ax=middle,
    )
    middle.axhline(ADAMW_RMS, color="0.4", linestyle=":", linewidth=1)
    finish(
        middle,
        title="Median per operator; dotted: 0.2, AdamW's usual size",
        x="optimizer step",
        y="update RMS per learning rate",
        log_y=True,
    )
    if several:  # the operators' colours are told by the panel beside it
        marks, texts = middle.get_legend_handles_labels()
        names = set(dataset["optimizer"].values)
        own = [(mark, text) for mark, text in zip(marks, texts, strict=True) if text in names]
        middle.legend(*zip(*own, strict=True), fontsize=8, title="optimizer", title_fontsize=8)
    intervals(right, operators, _bars(dataset, "median_update_rms_per_lr"), [palette[o] for o in operators])
    right.axvline(ADAMW_RMS, color="0.4", linestyle=":", linewidth=1)
    finish(right, title="Median over all records; bars: 95 % over layers", x="update RMS per learning rate", y="", log_x=True)
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    bars = zip(dataset["of_optimizer"].values, *_bars(dataset, "median_to_adamw"), strict=True)
    per_optimizer = [f"{o} {with_interval(m, low, high, '.2f')}" for o, low, m, high in bars if np.isfinite(m)]
    if not per_optimizer:
        return "No update in this run is finite."
    text = f"Update RMS per learning rate over AdamW's 0.2, median: {', '.join(per_optimizer)}."
    known = int(np.isfinite(dataset["residual"].values).sum())
    if known:
        low, a, high = map(float, _bars(dataset, "overall_alignment"))
        text += f" Orthogonalised updates have {with_interval(a, low, high, '.2f')} times the size of an exact polar factor; {int(dataset['off_target'].sum())} of {known} lie outside what their residual explains."
    split, of = (dataset.attrs.get(name, 0) for name in ("split_records", "records"))
    if split < of:
        text += f" What of a residual is under-lifted and what is the coefficients' band is told over {split} of {of:,} records."
    return text


def _bars(dataset: xr.Dataset, name: str) -> NDArray[np.float64]:
    """Lower end, value and upper end, shape (3, …)."""
    return np.stack([dataset[name + suffix].values for suffix in ENDS])
