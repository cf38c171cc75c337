"""How much training does a loss take, in steps, tokens and wall time? (AdaMuon, Table 1, Fig. 1–2)"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ...diagnostics.evenly_spread import evenly_spread
from ..figures import axes, finish
from ..training_curve import UNITS, first_reach, saved, spent, training_curve, validation_loss

QUESTION = "How much training does a loss take, in steps, tokens and wall time?"
READING = (
    "The thin line is the loss as it was logged, the thick one is smoothed. Dots mark when a share of the whole fall of the loss had "
    "been had: where they lie far apart, the last gains were dear."
)

SHARES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)  # of the fall of the smoothed loss, from its first value to its lowest
POINTS = 2000  # of a curve that are drawn


def study(run: xr.DataTree, baseline: xr.DataTree | None = None) -> xr.Dataset:
    """Loss over steps, tokens and seconds, and what it took to reach given losses.

    The smoothed loss is an exponential moving average with bias correction (attribute `time_constant`, in steps), a loss counts as
    reached where that first is at it or under it, linear between logged values. Its last value lags behind a falling loss by about the time constant.

    Args:
        run: as from `open_run`.
        baseline: another run; then `saved` says what was saved against it (AdaMuon, Table 1).

    Returns:
        As of `training_curve`, along `step`; `target` (share): losses; `to_target` (share, unit): what it took to reach them;
        `spent` (unit): in all; `validation` (validation_step), where one was logged. With a baseline `saved` (unit): 1 − what it took to reach
        the baseline's last smoothed loss over what that took the baseline, negative where it took more, missing where it was not reached.

    Raises:
        ValueError: no training loss was logged.
    """
    curve = training_curve(run)
    first, least = float(curve["ema"][0]), float(curve["ema"].min())
    targets = [first - share * (first - least) for share in SHARES] if first > least else []
    reached = [list(first_reach(curve, target).values()) for target in targets]
    steps, values = validation_loss(run)
    result = curve.assign(
        target=("share", np.array(targets)),
        to_target=(("share", "unit"), np.array(reached).reshape(-1, len(UNITS))),
        spent=("unit", list(spent(curve).values())),
        validation=("validation_step", values),
    ).assign_coords(share=list(SHARES[: len(targets)]), unit=list(UNITS), validation_step=steps)
    if baseline is not None:
        reference = training_curve(baseline, curve.attrs["time_constant"])
        target = float(reference["ema"][-1])
        result["saved"] = ("unit", list(saved(first_reach(curve, target), first_reach(reference, target)).values()))
    return result


def plot(dataset: xr.Dataset) -> Figure:
    """Loss over steps, over tokens and over wall time, as far as they are known."""
    units = [unit for unit in UNITS if np.isfinite(dataset[unit].values).sum() > 1] or ["steps"]
    figure, panels = axes(len(units), width=8.0 if len(units) == 1 else 4.8, height=4.0)
    # What a diverged loss reaches would hide all else.
    finite = dataset["loss"].values
    log_y = bool((finite > 0).all() and finite.max() > 20 * finite.min())
    for ax, unit in zip(panels, units, strict=True):
        _panel(ax, dataset, unit)
        finish(
            ax,
            title="" if len(units) > 1 else f"Smoothed over {dataset.attrs['time_constant']:.3g} steps",
            x=UNITS[unit],
            y=f"{dataset.attrs['loss_name']}" if ax is panels[0] else "",
            log_y=log_y,
        )
    if len(units) > 1:
        titles = {"steps": "Loss over steps", "tokens": "over tokens", "seconds": "over wall time"}
        for ax, unit in zip(panels, units, strict=True):
            ax.set_title(titles[unit], fontsize=10)
    panels[0].legend(loc="upper right", frameon=False, fontsize=8)
    for ax, unit in zip(panels, units, strict=True):
        if unit != "seconds":
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _panel(ax: Axes, dataset: xr.Dataset, unit: str) -> None:
    x, colour = dataset[unit].values, sns.color_palette("deep")
    chosen = evenly_spread(len(x), POINTS)
    ax.plot(x[chosen], dataset["loss"].values[chosen], color="0.75", linewidth=0.7, label="as logged")
    ax.plot(x[chosen], dataset["ema"].values[chosen], color=colour[0], linewidth=1.8, label="smoothed", marker="o" if len(x) == 1 else None)
    at = dataset["to_target"].sel(unit=unit).values
    ax.plot(at, dataset["target"].values, "o", color=colour[0], markersize=4)
    for i, (share, there, target) in enumerate(zip(dataset["share"].values, at, dataset["target"].values, strict=True)):
        # The last ones lie too close to each other for a text each.
        if i in (0, 2, len(at) - 1) and np.isfinite(there):
            ax.annotate(f"{share:.0%}", (there, target), xytext=(3, 6), textcoords="offset points", fontsize=8, color="0.3")
    if unit == "steps" and dataset.sizes["validation_step"]:
        ax.plot(dataset["validation_step"].values, dataset["validation"].values, "D", color=colour[1], markersize=5, label="validation")


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    in_all = {str(unit): float(value) for unit, value in zip(dataset["unit"].values, dataset["spent"].values, strict=True)}
    constant = f"smoothed over {dataset.attrs['time_constant']:.3g} steps"
    if not dataset.sizes["share"]:
        return f"The {dataset.attrs['loss_name']} ({constant}) never fell below where it began, {float(dataset['ema'][0]):.3g}."
    half, most = (dataset["to_target"].sel(share=share, unit="steps").item() for share in (0.5, 0.9))
    text = (
        f"The {dataset.attrs['loss_name']} fell from {float(dataset['loss'][0]):.3g} to {float(dataset['ema'][-1]):.3g} ({constant}) in {written(in_all)}; "
        f"half of that was had after {half / in_all['steps']:.0%} of the steps, 90 % after {most / in_all['steps']:.0%}."
    )
    if dataset.sizes["validation_step"]:
        text += f" Last validation loss: {float(dataset['validation'][-1]):.3g}, at step {int(dataset['validation_step'][-1])}."
    if not np.isfinite(in_all["tokens"]):
        text += " Tokens are not known; attach with about={'tokens_per_step': …} for them."
    if "saved" in dataset:
        kept = {str(u): float(v) for u, v in zip(dataset["unit"].values, dataset["saved"].values, strict=True) if np.isfinite(v)}
        parts = ", ".join(f"{value:.1%} of the {unit}" for unit, value in kept.items())
        text += f" Against the baseline it saved {parts}." if kept else " It never reached the baseline's last loss."
    return text


def written(amount: dict[str, float]) -> str:
    """Steps, tokens and seconds in words, as far as they are known."""
    texts = {"steps": "{:.0f} steps", "tokens": "{:.3g} tokens", "seconds": "{:.3g} s"}
    return ", ".join(texts[unit].format(value) for unit, value in amount.items() if np.isfinite(value))
