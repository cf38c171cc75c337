"""Do shallow and deep layers of one operator go different ways? (AMO, Fig. 10, 14)"""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..figures import axes, finish, operator_palette
from ..run import median_by, operators_of, spectra

QUESTION = "Do shallow and deep layers of one operator go different ways?"
READING = (
    "Solid and dashed lines of one colour are the first and the last layers of the same operator. Where they part, one schedule "
    "for the whole operator suits only one of them."
)


def study(run: xr.DataTree, operators: Sequence[str] | None = None) -> xr.Dataset:
    """Median κ over the first and the last third of the layers, for chosen operators.

    Args:
        run: as from `open_run`.
        operators: which; by default the ones with the largest and the smallest median κ.

    Returns:
        `median` (step, depth, operator), depth being "shallow" or "deep".

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
        raise ValueError("run: no operator has spectra both in shallow and in deep layers (layers are found by the matrices' names)")
    if operators is None:
        overall = [float(np.nanmedian(geometry["condition_number"].values[:, label == o])) for o in comparable]
        operators = list(dict.fromkeys([comparable[int(np.argmax(overall))], comparable[int(np.argmin(overall))]]))
    if missing := set(operators) - set(comparable):
        raise ValueError(f"operators: {', '.join(sorted(missing))} not in shallow and deep layers of this run; {', '.join(comparable)} are")
    return xr.Dataset(
        {"median": (("step", "depth", "operator"), medians(operators))},
        coords={"step": geometry["step"].values, "depth": list(depths), "operator": list(operators)},
        attrs={"layers_per_third": third},
    )


def plot(dataset: xr.Dataset) -> Figure:
    """Paired lines: colour by operator, dashes for deep layers."""
    operators = [str(o) for o in dataset["operator"].values]
    table = dataset["median"].to_dataframe().reset_index()
    figure, (ax,) = axes(width=7.0)
    sns.lineplot(
        table,
        x="step",
        y="median",
        hue="operator",
        style="depth",
        palette=operator_palette(operators),
        hue_order=operators,
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
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    decades = np.log10(dataset["median"].sel(depth="deep").values / dataset["median"].sel(depth="shallow").values)
    parts = [f"{o!s}: {r:+.2f}" for o, r in zip(dataset["operator"].values, np.nanmedian(decades, axis=0), strict=True)]
    return "Deep over shallow layers, decades of κ (median over steps): " + ", ".join(parts) + "."
