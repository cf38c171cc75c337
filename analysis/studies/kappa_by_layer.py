"""How does conditioning change with depth? (AMO, Fig. 3c, 9, 13)"""

import warnings

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.bootstrap import interval, resamples, with_interval
from ...diagnostics.store.run_error import RunError
from ..figures import axes, finish
from ..run import median_by, spectra

QUESTION = "How does conditioning change with depth?"
READING = (
    "Each line is one moment of the training. A line that rises to the right says that deep layers are harder to orthogonalise "
    "than shallow ones; bars, drawn for the last of them, are the quartiles of a layer's matrices."
)

SNAPSHOTS = 4


def study(run: xr.DataTree) -> xr.Dataset:
    """Median κ per layer at four recorded steps, evenly spread over those that have one.

    Variables: `median`, `lower`, `upper` (quartiles over the layer's matrices), dimensions (step, layer); `trend` (step), what a straight line
    through log10 of the medians rises from the first to the last layer, in decades, with `trend_low` and `trend_high`, 95 % over layers.

    Raises:
        ValueError: no geometry in the run, or no layer index in any matrix's name.
    """
    geometry = spectra(run)[["condition_number"]].load()
    label = geometry["layer"].values
    layers = sorted({int(layer) for layer in label if layer >= 0})
    known = np.flatnonzero(np.isfinite(geometry["condition_number"].values[:, label >= 0]).any(axis=1))
    if not len(known):
        raise RunError("no matrix with a spectrum holds a layer index in its name, so there is no depth profile")
    geometry = geometry.isel(step=np.unique(known[np.linspace(0, len(known) - 1, SNAPSHOTS).round().astype(int)]))
    quartiles = {
        name: (("step", "layer"), median_by(geometry["condition_number"], label, layers, q))
        for name, q in (("lower", 0.25), ("median", 0.5), ("upper", 0.75))
    }
    trend = {
        f"trend{suffix}": ("step", values)
        for suffix, values in zip(("_low", "", "_high"), _trend(layers, quartiles["median"][1]), strict=True)
    }
    return xr.Dataset({**quartiles, **trend}, coords={"step": geometry["step"].values, "layer": layers})


def _trend(layers: list[int], kappa: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lower end, value and upper end of the rise of log10 κ (step, layer) over the layers, shape (3, step); missing for one layer."""
    chosen = resamples(layers)
    low, high = interval(_rise(layers, kappa, chosen)) if len(chosen) else np.full((2, len(kappa)), np.nan)
    return np.stack([low, _rise(layers, kappa, np.arange(len(layers))), high])


def _rise(layers: list[int], kappa: NDArray[np.float64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Least-squares slope times the distance of the first and the last layer, of chosen layers (…, layers): shape (step, …)."""
    y = np.log10(kappa)[:, chosen]
    x = np.where(np.isfinite(y), np.asarray(layers, np.float64)[chosen], np.nan)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample of one layer, or of layers without a spectrum
        x, y = x - np.nanmean(x, axis=-1, keepdims=True), y - np.nanmean(y, axis=-1, keepdims=True)
        return np.asarray(np.nansum(x * y, axis=-1) / np.nansum(x * x, axis=-1) * (layers[-1] - layers[0]))


def plot(dataset: xr.Dataset) -> Figure:
    """Profile of median κ over layers, one line per snapshot, quartiles at the last."""
    table = dataset["median"].to_dataframe().reset_index()
    figure, (ax,) = axes(width=6.6)
    sns.lineplot(
        table,
        x="layer",
        y="median",
        hue="step",
        palette="viridis",
        hue_norm=(0, table["step"].max()),
        legend="full",
        marker="o",
        ax=ax,
        errorbar=None,
    )
    last = dataset.isel(step=-1)
    middle = last["median"].values
    reach = np.stack([middle - last["lower"].values, last["upper"].values - middle])
    ax.errorbar(last["layer"].values, middle, yerr=reach, color="0.6", linestyle="none", elinewidth=1, zorder=1)
    ax.set_xticks(dataset["layer"].values[:: max(1, dataset.sizes["layer"] // 16)])
    finish(
        ax,
        title="Median condition number by depth; bars: quartiles at the last step",
        x="layer",
        y="condition number κ of the NS input",
        log_y=True,
    )
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    last = dataset["median"].isel(step=-1).dropna("layer")
    hardest, easiest = (int(last["layer"][int(i)]) for i in (np.argmax(last.values), np.argmin(last.values)))
    text = f"At step {int(last['step'])} median κ is largest in layer {hardest} ({float(last.max()):.3g}) and smallest in layer {easiest} ({float(last.min()):.3g})."
    trend, low, high = (float(dataset[f"trend{suffix}"].isel(step=-1)) for suffix in ("", "_low", "_high"))
    if not np.isfinite(trend):
        return text
    text += f" From the first to the last layer it changes, in decades, by {with_interval(trend, low, high, '+.2f')}"
    return text + (", which may be chance." if low <= 0 <= high else ".")
