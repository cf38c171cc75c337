"""Which quantities moved before a loss spike?"""

from collections.abc import Iterator

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.catalogue import Quantity, in_group
from ...diagnostics.evenly_spread import evenly_spread
from ...diagnostics.nan_quantile import nan_quantile
from ..figures import axes, finish
from ..run import median_by, operators_of, records
from ..training_curve import training_curve

QUESTION = "Which quantities moved before a loss spike?"
READING = (
    "Left: the loss, with its spikes marked. Right: what moved most in the 50 steps before them, compared with how much the same quantity moves in "
    "other 50 steps of this run; a bar beyond the line is more than chance among so many quantities explains. A quantity that moves first is a lead, not a cause."
)

WINDOW = 50  # steps before a spike that are looked at; as many records before that are a quantity's own history
HEIGHT = 6.0  # a spike's rise over the running median, in robust standard deviations …
RISE = 0.05  # … and in relative terms at least this, for losses that hardly vary
HISTORY, LEAST_HISTORY = 50, 5
NULL_WINDOWS, NULL_DRAWS = 300, 999
NOISE = 1e-3  # of a quantity that never moved in its history, in its own unit (decades, mostly): what counts as standing still
SHOWN = 14
POINTS = 2000  # of the loss that are drawn
BLOCK = 10_000  # logged losses at a time, for memory's sake

# Settings, not measurements.
_LEFT_OUT = {"lr", "weight_decay", "update_rms_target", "second_moment_eps", "factor_exponent", "subspace_overlap_null"}

Floats = NDArray[np.float64]


def study(run: xr.DataTree) -> xr.Dataset:
    """Loss spikes, and how far each recorded quantity had moved in the 50 steps before them.

    A spike is a logged loss whose log lies above the median of the 50 before it by 6 robust standard deviations (1.4826·MAD of what
    the 50 deviate by) and by 5 %, and what follows within 50 steps belongs to it. The score of a quantity (median over an
    operator's matrices; log10 where it is positive throughout) is its largest deviation in the 50 steps before a spike, from the median of up
    to 50 records before those and in units of their 1.4826·MAD; with several spikes the mean of its size. The null is the same score at windows that are
    not within 100 steps of a spike: `ratio` is the score over the null's 95 % quantile, and `threshold` the 95 % quantile, over null draws,
    of the largest ratio of all quantities (Westfall and Young's max-T): beyond it one false lead among all quantities is expected in 5 % of
    runs. Null windows overlap, so that the threshold is approximate.

    Returns:
        `loss`, `typical` (running median), `limit` along `logged_step`; `spike_step` (spike); per quantity of an operator (`lead`): `score`, `ratio`,
        `moved` (the signed deviation at the spike with the largest), with coordinates `quantity`, `operator`; attributes
        `threshold`, `null_windows`, `unexamined` (spikes without enough records before them).

    Raises:
        ValueError: no training loss was logged.
    """
    curve = training_curve(run)
    typical, limit, spikes = find_spikes(curve["steps"].values, curve["loss"].values)
    result = xr.Dataset(
        {"loss": ("logged_step", curve["loss"].values), "typical": ("logged_step", typical), "limit": ("logged_step", limit)},
        coords={"logged_step": curve["step"].values, "spike_step": ("spike", spikes)},
        attrs={"loss_name": curve.attrs["loss_name"], "threshold": np.nan, "null_windows": 0, "unexamined": len(spikes)},
    )
    leads = _leads(run, spikes) if len(spikes) else None
    return result if leads is None else result.merge(leads, combine_attrs="override").assign_attrs(leads.attrs)


def find_spikes(steps: Floats, loss: Floats) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Running median of the loss, the limit above it, and the first step of every spike."""
    log = np.log(np.maximum(loss, np.finfo(float).tiny))
    typical, limit = np.full(len(log), np.nan), np.full(len(log), np.nan)
    before = np.lib.stride_tricks.sliding_window_view(np.concatenate([np.full(HISTORY, np.nan), log[:-1]]), HISTORY)
    for start in range(LEAST_HISTORY, len(log), BLOCK):
        block = slice(start, start + BLOCK)
        median = nan_quantile(before[block])
        spread = 1.4826 * nan_quantile(np.abs(before[block] - median[:, None]))
        typical[block], limit[block] = np.exp(median), np.exp(median + np.maximum(HEIGHT * spread, np.log1p(RISE)))
    above = steps[np.isfinite(limit) & (loss > limit)]
    first: list[float] = []
    last = -np.inf
    for step in above:
        if step - last > WINDOW:
            first.append(step)
        last = step
    return typical, limit, np.array(first, dtype=np.int64)


def _leads(run: xr.DataTree, spikes: NDArray[np.int64]) -> xr.Dataset | None:
    """Scores of all quantities against their null; None where no spike has enough records before it."""
    steps, series, labels = _series(run)
    if not len(labels):
        return None
    moved = np.array([found for spike in spikes if (found := deviation(steps, series, int(spike))) is not None])
    far = [s for s in steps if np.abs(spikes - s).min() > 2 * WINDOW]
    elsewhere = [
        found for s in np.array(far)[evenly_spread(len(far), NULL_WINDOWS)] if (found := deviation(steps, series, int(s))) is not None
    ]
    if not len(moved) or len(elsewhere) < 20:
        return None
    null = np.abs(np.array(elsewhere))
    draws = null[np.random.default_rng(0).integers(len(null), size=(NULL_DRAWS, len(moved)))].mean(axis=1)
    score, scale = np.abs(moved).mean(axis=0), np.maximum(np.quantile(draws, 0.95, axis=0), 1.0)
    ratio = score / scale
    order = np.argsort(-ratio, kind="stable")
    largest = moved[np.abs(moved).argmax(axis=0), np.arange(len(labels))]
    return xr.Dataset(
        {"score": ("lead", score[order]), "ratio": ("lead", ratio[order]), "moved": ("lead", largest[order])},
        coords={"quantity": ("lead", [labels[i][0] for i in order]), "of_operator": ("lead", [labels[i][1] for i in order])},
        attrs={
            "threshold": float(np.quantile((draws / scale).max(axis=1), 0.95)),
            "null_windows": len(null),
            "unexamined": len(spikes) - len(moved),
        },
    )


def deviation(steps: NDArray[np.int64], series: Floats, at: int) -> Floats | None:
    """Signed largest robust z of every series (rows: records) in the window before step `at`; None without 5 records before the window."""
    first, last = np.searchsorted(steps, [at - WINDOW, at])
    history = series[max(0, first - HISTORY) : first]
    if last <= first or len(history) < LEAST_HISTORY:
        return None
    median = np.median(history, axis=0)
    z = (series[first:last] - median) / np.maximum(1.4826 * np.median(np.abs(history - median), axis=0), NOISE)
    extreme: Floats = z[np.abs(z).argmax(axis=0), np.arange(series.shape[1])]
    return extreme


def _series(run: xr.DataTree) -> tuple[NDArray[np.int64], Floats, list[tuple[str, str]]]:
    """Records' steps, one column per quantity and operator, and their names; columns with gaps are left out."""
    columns: list[Floats] = []
    labels: list[tuple[str, str]] = []
    common: NDArray[np.int64] | None = None
    for group in map(str, run.children):
        quantities = [q for q in in_group(group) if _is_measured(q) and q.name in run[group]]
        if not quantities or not run[group].sizes.get("step"):
            continue
        dataset = records(run, group)
        steps = dataset["step"].values
        if common is None:
            common = steps
        if not np.array_equal(steps, common):
            continue  # a run that was continued with another choice of groups
        for label, column in _of_group(dataset, quantities):
            columns.append(column)
            labels.append(label)
    steps = np.empty(0, np.int64) if common is None else common
    return steps, np.stack(columns, axis=1) if columns else np.empty((len(steps), 0)), labels


def _of_group(dataset: xr.Dataset, quantities: list[Quantity]) -> Iterator[tuple[tuple[str, str], Floats]]:
    operators = operators_of(dataset)
    for quantity in quantities:
        values = dataset[quantity.name].astype(np.float64)
        for operator, column in zip(operators, median_by(values, dataset["operator"].values, operators).T, strict=True):
            if np.isfinite(column).all() and np.ptp(column) > 0:
                yield (quantity.name, operator), np.log10(column) if (column > 0).all() else column


def _is_measured(quantity: Quantity) -> bool:
    return quantity.extra is None and quantity.dtype.startswith("float") and quantity.name not in _LEFT_OUT


def plot(dataset: xr.Dataset) -> Figure:
    """Left: the loss with its spikes. Right, where there is any: what moved before them."""
    if "ratio" not in dataset:
        figure, (left,) = axes(width=8.0)
    else:
        figure, (left, right) = axes(2, width=6.2, height=4.6)
        _bars(right, dataset)
    step = dataset["logged_step"].values
    chosen = evenly_spread(len(step), POINTS)
    left.plot(step[chosen], dataset["loss"].values[chosen], color="0.6", linewidth=0.8, marker="o" if len(step) < 3 else None, label="loss")
    if np.isfinite(dataset["limit"].values).any():
        left.plot(step[chosen], dataset["limit"].values[chosen], color=sns.color_palette("deep")[3], linewidth=1, label="limit of a spike")
    for spike in dataset["spike_step"].values if "spike_step" in dataset.coords else ():
        at = int(np.searchsorted(step, spike))
        left.plot(spike, dataset["loss"].values[at], "v", color=sns.color_palette("deep")[3], markersize=6)
    left.legend(loc="upper right", frameon=False, fontsize=8)
    count = dataset.sizes.get("spike", 0)
    title = "No spike of the loss" if not count else f"{count} spike{'' if count == 1 else 's'} of the loss"
    finish(left, title=title, x="optimizer step", y=dataset.attrs["loss_name"], log_y=bool((dataset["loss"].values > 0).all()))
    return figure


def _bars(ax: Axes, dataset: xr.Dataset) -> None:
    top = dataset.isel(lead=slice(SHOWN))
    names = [f"{q} {o}" for q, o in zip(top["quantity"].values, top["of_operator"].values, strict=True)]
    colours = sns.color_palette("deep")
    signs = top["moved"].values > 0
    threshold = float(dataset.attrs["threshold"])
    # Behind the dashed line, which would cross a number beside a shorter bar.
    beyond = np.maximum(top["ratio"].values, threshold)
    ax.barh(range(len(names)), top["ratio"].values, color=[colours[3] if up else colours[0] for up in signs])
    for i, (score, up) in enumerate(zip(top["score"].values, signs, strict=True)):
        ax.annotate(
            f"{'+' if up else '−'}{score:.1f}",
            (beyond[i], i),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    ax.axvline(threshold, color="0.3", linestyle="--", linewidth=1)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    finish(ax, title="Moved in the 50 steps before; dashed: chance", x="deviation over what other windows have (95 %)", y="")


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    steps = [int(s) for s in dataset["spike_step"].values] if "spike_step" in dataset.coords else []
    if not steps:
        return f"No spike: the {dataset.attrs['loss_name']} never rose above its running median by {HEIGHT:.0f} robust standard deviations and {RISE:.0%}."
    told = f"{len(steps)} spike{'' if len(steps) == 1 else 's'} of the {dataset.attrs['loss_name']}, first at step {steps[0]}"
    if "ratio" not in dataset:
        return f"{told}; there are too few records before and between them to tell what moved."
    beyond = dataset["ratio"].values > dataset.attrs["threshold"]
    compared = f"among {dataset.sizes['lead']} quantities and {dataset.attrs['null_windows']} other windows"
    if not beyond.any():
        first = dataset.isel(lead=0)
        return f"{told}; nothing moved before by more than chance explains {compared} (most: {first['quantity'].item()} of {first['of_operator'].item()})."
    leads = [
        f"{q} of {o} ({m:+.1f} robust standard deviations)"
        for q, o, m in zip(*(dataset[name].values[beyond][:3] for name in ("quantity", "of_operator", "moved")), strict=True)
    ]
    return f"{told}; in the {WINDOW} steps before, {int(beyond.sum())} moved by more than chance explains {compared}, most: {', '.join(leads)}."
