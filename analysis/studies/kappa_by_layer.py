"""How does conditioning change with depth? (AMO, Fig. 3c, 9, 13)"""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from ..figures import axes, finish
from ..run import median_by, spectra

QUESTION = "How does conditioning change with depth?"
READING = (
    "Each line is one moment of the training. A line that rises to the right says that deep layers are harder to orthogonalise "
    "than shallow ones."
)

SNAPSHOTS = 4


def study(run: xr.DataTree) -> xr.Dataset:
    """Median κ per layer at four recorded steps, evenly spread over those that have one.

    Variables: `median`, `lower`, `upper` (quartiles over the layer's matrices), dimensions (step, layer).

    Raises:
        ValueError: no geometry in the run, or no layer index in any matrix's name.
    """
    geometry = spectra(run)[["condition_number"]].load()
    label = geometry["layer"].values
    layers = sorted({int(layer) for layer in label if layer >= 0})
    known = np.flatnonzero(np.isfinite(geometry["condition_number"].values[:, label >= 0]).any(axis=1))
    if not len(known):
        raise ValueError("run: no matrix with a spectrum holds a layer index in its name, so there is no depth profile")
    geometry = geometry.isel(step=np.unique(known[np.linspace(0, len(known) - 1, SNAPSHOTS).round().astype(int)]))
    quartiles = {
        name: (("step", "layer"), median_by(geometry["condition_number"], label, layers, q))
        for name, q in (("lower", 0.25), ("median", 0.5), ("upper", 0.75))
    }
    return xr.Dataset(quartiles, coords={"step": geometry["step"].values, "layer": layers})


def plot(dataset: xr.Dataset) -> Figure:
    """Profile of median κ over layers, one line per snapshot."""
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
    ax.set_xticks(dataset["layer"].values[:: max(1, dataset.sizes["layer"] // 16)])
    finish(ax, title="Median condition number by depth", x="layer", y="condition number κ of the NS input", log_y=True)
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    last = dataset["median"].isel(step=-1).dropna("layer")
    hardest, easiest = (int(last["layer"][int(i)]) for i in (np.argmax(last.values), np.argmin(last.values)))
    return f"At step {int(last['step'])} median κ is largest in layer {hardest} ({float(last.max()):.3g}) and smallest in layer {easiest} ({float(last.min()):.3g})."
