"""How sharp is the loss, for which operators, and how does that change over training? (Hutchinson; Sophia, arXiv 2305.14342)"""

import warnings

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.store.run_error import RunError
from ..figures import axes, finish, operator_palette
from ..run import operators_of, records

QUESTION = "How sharp is the loss, for which operators, and how does that change over training?"
READING = (
    "The higher a line, the more the loss bends when weights of that kind are moved: such operators bear the smallest steps. Bars are one standard "
    "error; two lines whose bars overlap are not told apart by so few probes. Values below zero mean a direction that curves downwards."
)
KINDS = {"hessian": "Mean of the Hessian's diagonal", "gauss_newton": "Mean of the Gauss–Newton diagonal"}


def study(run: xr.DataTree) -> xr.Dataset:
    """Mean diagonal of the Hessian, and of the Gauss–Newton matrix, over all weights of an operator, with standard errors.

    Variables (step, operator): `hessian`, `hessian_error`, `gauss_newton`, `gauss_newton_error`. Matrices share their probes: with
    Var(Σ t_j) = Σ Var t_j + Σ_{j≠k} ‖H_jk‖² and Var t_j ≥ Σ_k ‖H_jk‖², the error of a sum is at most √2 times the root of the summed squares,
    which is what is given.

    Raises:
        ValueError: no curvature in the run, or no finite one.
    """
    curvature = records(run, "curvature").load()
    operators, label = operators_of(curvature), curvature["operator"].values
    size = (curvature["rows"] * curvature["cols"]).values.astype(np.float64)
    result = xr.Dataset(coords={"step": curvature["step"].values, "operator": operators})
    for kind in KINDS:
        mean, error = curvature[f"{kind}_mean"].values, curvature[f"{kind}_mean_error"].values
        known = np.isfinite(mean)
        for name, values in ((kind, np.where(known, mean * size, 0)), (f"{kind}_error", np.where(known, (error * size) ** 2, 0))):
            total = np.stack([values[:, label == o].sum(axis=1) for o in operators], axis=1)
            weight = np.stack([(known * size)[:, label == o].sum(axis=1) for o in operators], axis=1)
            several = np.array([1.0 if (label == o).sum() == 1 else 2.0 for o in operators])
            found = np.sqrt(several * total) if name.endswith("_error") else total
            result[name] = (("step", "operator"), np.divide(found, weight, out=np.full_like(weight, np.nan), where=weight > 0))
    if not any(np.isfinite(result[kind].values).any() for kind in KINDS):
        raise RunError("no recorded curvature is finite; see the warnings of recorder.curvature")
    return result


def plot(dataset: xr.Dataset) -> Figure:
    """Hessian and, where it was recorded, Gauss–Newton mean per operator over training, with one standard error."""
    shown = [kind for kind in KINDS if np.isfinite(dataset[kind].values).any()]
    operators = [str(o) for o in dataset["operator"].values]
    palette = operator_palette(operators)
    figure, panels = axes(len(shown))
    for ax, kind in zip(panels, shown, strict=True):
        for o in operators:
            one = dataset.sel(operator=o).dropna("step", subset=[kind])
            if one.sizes["step"]:
                ax.errorbar(
                    one["step"], one[kind], yerr=one[f"{kind}_error"].fillna(0), color=palette[o], label=o, marker="o", markersize=3, linewidth=1.2,
                    elinewidth=0.8,
                )  # fmt: skip
        if kind == "hessian":
            ax.axhline(0, color="0.4", linewidth=0.8)
        ax.legend(ncols=1)
        finish(
            ax,
            title=f"{KINDS[kind]}; bars: one standard error",
            x="optimizer step",
            y="gradient units per parameter unit",
            log_y=kind != "hessian",
        )
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    kind = next(kind for kind in KINDS if np.isfinite(dataset[kind].values).any())
    clear = dataset[kind].where(np.abs(dataset[kind]) > 2 * dataset[f"{kind}_error"])
    middle = {str(o): _median(clear.sel(operator=o).values) for o in dataset["operator"].values}
    told = {o: value for o, value in middle.items() if np.isfinite(value)}
    name = "Hessian" if kind == "hessian" else "Gauss–Newton"
    if not told:
        return f"No operator's mean {name} diagonal lies 2 standard errors from zero; more probes would tell."
    sharpest = max(told, key=lambda o: told[o])
    text = f"Sharpest operator by its mean {name} diagonal: {sharpest} ({told[sharpest]:.2g}, median of the records that tell it from zero)"
    others = [o for o in told if o != sharpest]
    return text + (f"; flattest: {min(others, key=lambda o: told[o])} ({min(told[o] for o in others):.2g})." if others else ".")


def _median(values: NDArray[np.float64]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an operator that no record tells from zero
        return float(np.nanmedian(values))
