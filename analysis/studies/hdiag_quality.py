"""How good are estimates of the Hessian's diagonal, and how many probes do they need? (Hutchinson; Gauss–Newton–Bartlett)"""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...diagnostics.store.run_error import RunError
from ..figures import axes, finish, intervals, operator_palette
from ..run import operators_of, recorded

QUESTION = "How good are the estimates of the Hessian's diagonal, and how many probes do they need?"
READING = (
    "Left: how far the mean of n probes scatters, relative to the mean itself; it falls as 1/√n (dotted), and where it is under 0.1 a mean is known to "
    "10 %. Right: what is left against the exact Hessian on the rows that have one. Hutchinson should lie at 0 within its bar; "
    "Gauss–Newton is another matrix, and its distance from 0 is what it leaves out; rows of rare tokens, which few draws hit, come out too low."
)
GROUPS_AT_LEAST = 4  # disjoint groups of n probes, from which a scatter is told
ESTIMATORS = {"hutchinson": ("hessian_probe_mean", "Hutchinson"), "gauss_newton": ("gauss_newton_draw_mean", "Gauss–Newton–Bartlett")}


def study(run: xr.DataTree) -> xr.Dataset:
    """Relative standard deviation of the mean diagonal against the number of probes, and the deviation from exact Hessians.

    Variables: `hutchinson` and `gauss_newton` (probes, operator): standard deviation of the means of disjoint groups of n probes over the size
    of the mean of all, root mean square over the operator's matrices and records, for n with 4 groups at least; `bias_` and
    `bias_error_` of both (operator): Σ(estimate − exact)/Σ|exact| over the rows with an exact Hessian, and its standard error (at most √2 times
    that of independent matrices).

    Raises:
        ValueError: no record has as many probes as that takes.
    """
    names = [name for name, _ in ESTIMATORS.values()]
    exact = [f"exact_{name}" for name in ("mean", "hutchinson_mean", "hutchinson_error", "gauss_newton_mean", "gauss_newton_error")]
    how = "no curvature in it has 4 probes or more; call recorder.curvature(loss_fn, probes=64) once in a while"
    curvature = recorded(run, "curvature", "hessian_mean", *names, *exact, otherwise=how)
    operators, label = operators_of(curvature), curvature["operator"].values
    counts = [2**k for k in range(5)]
    result = xr.Dataset(coords={"probes": counts, "operator": operators})
    for key, (name, _) in ESTIMATORS.items():
        result[key] = (("probes", "operator"), np.array([_scatter(curvature[name].values, n, label, operators) for n in counts]))
        truth, mean, error = (curvature[q].values for q in ("exact_mean", f"exact_{key}_mean", f"exact_{key}_error"))
        known = np.isfinite(truth) & np.isfinite(mean)
        size, off, square = (
            np.array([np.where(known, values, 0)[:, label == o].sum() for o in operators])
            for values in (np.abs(truth), mean - truth, 2 * error**2)
        )
        some = np.where(size > 0, size, np.nan)
        result[f"bias_{key}"], result[f"bias_error_{key}"] = ("operator", off / some), ("operator", np.sqrt(square) / some)
    if not any(np.isfinite(result[key].values).any() for key in ESTIMATORS):
        raise RunError(f"{how}")
    return result


def plot(dataset: xr.Dataset) -> Figure:
    """Left: relative deviation against n, log–log. Right, where exact Hessians were taken: what is left against them."""
    operators = [str(o) for o in dataset["operator"].values]
    palette = operator_palette(operators)
    exact = any(np.isfinite(dataset[f"bias_{key}"].values).any() for key in ESTIMATORS)
    figure, panels = axes(2 if exact else 1, height=max(4.2, 0.34 * len(operators) + 1.4))
    ax, n = panels[0], dataset["probes"].values.astype(np.float64)
    for key, line, marker in (("hutchinson", "-", "o"), ("gauss_newton", "--", "s")):
        for o in operators:
            values = dataset[key].sel(operator=o).values
            if np.isfinite(values).any():
                ax.plot(n, values, color=palette[o], linestyle=line, marker=marker, markersize=4, label=o if key == "hutchinson" else None)
        if np.isfinite(dataset[key].values).any():
            ax.plot([], [], color="0.4", linestyle=line, marker=marker, markersize=4, label=ESTIMATORS[key][1])
            start = float(np.nanmedian(dataset[key].values[0]))
            if start > 0:
                ax.plot(n, start / np.sqrt(n), color="0.4", linestyle=":", linewidth=1)
    ax.legend()
    finish(ax, title="Scatter of a matrix's mean; dotted: 1/√n", x="probes n", y="standard deviation over mean", log_x=True, log_y=True)
    if exact:
        for key, offset, marker in (("hutchinson", -0.12, "o"), ("gauss_newton", 0.12, "s")):
            value, error = dataset[f"bias_{key}"].values, np.nan_to_num(dataset[f"bias_error_{key}"].values)
            if np.isfinite(value).any():
                bars = np.stack([value - 2 * error, value, value + 2 * error])
                intervals(
                    panels[1], operators, bars, [palette[o] for o in operators], label=ESTIMATORS[key][1], offset=offset, marker=marker
                )
        panels[1].axvline(0, color="0.4", linewidth=0.8)
        panels[1].legend()
        finish(panels[1], title="Against exact Hessians; bars: 2 standard errors", x="Σ(estimate − exact)/Σ|exact|", y="operator")
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    parts = []
    for key, (_, name) in ESTIMATORS.items():
        values = dataset[key].values[0]
        if np.isfinite(values).any():
            one = float(np.nanmedian(values))
            parts.append(
                f"one probe of {name} gives a matrix's mean to {one:.0%}, so that 10 % takes about {max(1, int(np.ceil((one / 0.1) ** 2)))}"
            )
    text = "; ".join(parts)
    bias, error = dataset["bias_hutchinson"].values, dataset["bias_error_hutchinson"].values
    known = np.isfinite(bias) & (error > 0)
    if known.any():
        inside = int((np.abs(bias) <= 2 * error)[known].sum())
        text += f"; against exact Hessians Hutchinson is within 2 standard errors for {inside} of {int(known.sum())} operators"
    return text[0].upper() + text[1:] + "."


def _scatter(means: NDArray[np.float64], n: int, label: NDArray[np.str_], operators: list[str]) -> list[float]:
    """Relative standard deviation of the mean of n probes, per operator, from disjoint groups; `means` (step, matrix, probe)."""
    groups = means.shape[-1] // n
    of_groups = means[..., : groups * n].reshape(*means.shape[:2], groups, n).mean(axis=-1)
    count = np.isfinite(of_groups).sum(axis=-1)
    filled = np.where(np.isfinite(of_groups), of_groups, 0)
    average = filled.sum(axis=-1) / np.maximum(count, 1)
    square = (np.where(np.isfinite(of_groups), of_groups - average[..., None], 0) ** 2).sum(axis=-1) / np.maximum(count - 1, 1)
    known = count >= GROUPS_AT_LEAST
    found = []
    for o in operators:
        own = known[:, label == o]
        mean = (average[:, label == o] ** 2)[own].sum()
        found.append(float(np.sqrt(square[:, label == o][own].sum() / mean)) if mean > 0 else np.nan)
    return found
