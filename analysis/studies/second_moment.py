"""How far is the second moment from ε, and how much of a step is signal? (Adam, arXiv 1412.6980)

Of m̂/√v̂ in pure noise: its RMS over coordinates is √ρ, ρ = (1 − β₁)/(1 + β₁), with independent gradients of mean zero, so that the
median of its absolute value is 0.6745·√ρ (Gaussian; .155 for β₁ = 0.9). It is not bounded by 1: see `snr_bound`.
"""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...diagnostics.store.run_error import RunError
from ..by_operator import median_and_extremes, medians_by
from ..figures import axes, finish, intervals, operator_lines, operator_palette
from ..run import betas, median_by, operators_of, recorded

QUESTION = "How far is the second moment from ε, and how much of a step is signal?"
READING = (
    "Left: the root of the second moment, by which a step is divided, against the optimizer's ε (dashed); where lines or grey come down to "
    "the dashed line, ε and not the gradients sets those steps. Middle: how many coordinates that are. Right: a line at the dotted "
    "level says that steps are what noise alone would make; the higher above it, the more successive gradients agree."
)

EDGES = {"_lower": 0.05, "": 0.5, "_upper": 0.95}  # of a matrix's elements: a line and its band
HALF_NORMAL_MEDIAN = 0.67449  # of |z|, z standard normal
NOT_OF_GRADIENTS = ("hessian", "preconditioner")  # forms that are no mean of squared gradients


def snr_bound(beta1: float, beta2: float) -> float:
    """Largest |m̂|/√v̂ that any gradients can give, t → ∞: (1−β₁)/√(1−β₂)/√(1−β₁²/β₂), reached by g_i ∝ (β₁/β₂)^i, i steps back.

    By Cauchy–Schwarz on Σ β₁^i g_i = Σ (β₁^i β₂^{−i/2})(β₂^{i/2} g_i). Infinite unless β₁² < β₂; 1 only for β₁ = β₂.

    >>> round(snr_bound(0.9, 0.999), 3), round(snr_bound(0.9, 0.95), 3), round(snr_bound(0.9, 0.9), 3)
    (7.27, 1.165, 1.0)
    """
    ratio = beta1**2 / beta2
    return (1 - beta1) / float(np.sqrt((1 - beta2) * (1 - ratio))) if ratio < 1 else float("inf")


def study(run: xr.DataTree) -> xr.Dataset:
    """Quantiles of √v̂ and of |m̂|/√v̂ per operator, the share of coordinates that ε dominates, and what noise alone would give.

    Variables: `root` and `snr` (step, operator), the median over the operator's matrices of the median over elements, with the
    same of the elements' 5 % and 95 % quantiles in `_lower` and `_upper`; `eps_share` (√v̂ < ε) and `near_eps_share` (√v̂ < 1000 ε)
    (operator), the median over matrices of a matrix's median over records, with `_low` and `_high`, 95 % over layers;
    `largest_eps_share` (operator), over all records and matrices; `eps` (operator); `noise` and `bound` (operator): median of |m̂|/√v̂
    in pure noise, and its upper bound, by the optimizer's betas, missing where they are not known.

    Raises:
        ValueError: no second moments in the run.
    """
    reason = "no optimizer in it keeps a second moment of its gradients (Adam does), so there is none to study"
    names = ("second_moment_quantile", "snr_quantile", "second_moment_eps", "eps_share", "near_eps_share", "second_moment_form")
    moment = recorded(run, "second_moment", *names, otherwise=reason)
    forms = [*moment.attrs["forms"], ""]
    own = [forms[form] not in NOT_OF_GRADIENTS for form in moment["second_moment_form"].values.max(axis=0)]
    if not any(own):
        raise RunError(f"{reason}")
    moment = moment.isel(matrix=np.flatnonzero(own)).drop_attrs()
    operators, label = operators_of(moment), moment["operator"].values
    result = xr.Dataset(coords={"step": moment["step"].values, "operator": operators})
    for name, quantiles in (("root", moment["second_moment_quantile"] ** 0.5), ("snr", moment["snr_quantile"])):
        for suffix, level in EDGES.items():
            values = median_by(quantiles.sel(level=level, method="nearest"), label, operators)
            result[name + suffix] = (("step", "operator"), values)
    for name in ("eps_share", "near_eps_share"):
        for suffix, bars in zip(("_low", "", "_high"), medians_by(moment[name], label, operators), strict=True):
            result[name + suffix] = ("operator", bars)
    result["largest_eps_share"] = ("operator", np.fmax.reduce(median_by(moment["eps_share"], label, operators, 1.0), axis=0))
    result["eps"] = ("operator", medians_by(moment["second_moment_eps"], label, operators)[1])
    known = betas(run)
    of = [known.get(str(moment["optimizer"].values[label == o][0])) for o in operators]
    result["noise"] = ("operator", [HALF_NORMAL_MEDIAN * np.sqrt((1 - b[0]) / (1 + b[0])) if b else np.nan for b in of])
    result["bound"] = ("operator", [snr_bound(*b) if b else np.nan for b in of])
    return result


def plot(dataset: xr.Dataset) -> Figure:
    """√v̂ against ε; share of coordinates under and near ε, where there is one; |m̂|/√v̂ against noise and bound, where it is known."""
    operators = [str(o) for o in dataset["operator"].values]
    colours = [operator_palette(operators)[o] for o in operators]
    shares, signal = (bool(np.isfinite(dataset[name]).any()) for name in ("near_eps_share", "snr"))
    figure, panels = axes(1 + shares + signal, width=5.4)
    _lines(panels[0], dataset, "root", legend=not signal)
    _levels(panels[0], dataset["eps"], "ε =", "--")
    finish(
        panels[0],
        title="Elements: median; grey: 5–95 % of all",
        x="optimizer step",
        y="√v̂ (gradient units)",
        log_y=True,
    )
    if shares:
        for offset, (name, text, look) in zip((-0.14, 0.14), SHARES, strict=True):
            bars = 100 * np.stack([dataset[name + suffix].values for suffix in ("_low", "", "_high")])
            intervals(panels[1], operators, bars, colours, label=text, offset=offset, **look)
        panels[1].set_xlim(-2, max(panels[1].get_xlim()[1], 10))
        finish(panels[1], title="Coordinates near ε; bars: 95 % over layers", x="share of coordinates (%)", y="operator")
        panels[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=8)
    if signal:
        _lines(panels[-1], dataset, "snr", legend=True)
        _levels(panels[-1], dataset["noise"], "noise alone", ":")
        _levels(panels[-1], dataset["bound"], "bound", "--", above=False)
        finish(panels[-1], title="Signal to noise: median; grey: 5–95 % of all", x="optimizer step", y="|m̂|/√v̂", log_y=True)
    return figure


def summary(dataset: xr.Dataset) -> str:
    """The result in a sentence."""
    text = f"Median √v̂ per operator: {median_and_extremes(dataset['root'].median('step').to_series(), '.2g')}"
    if np.isfinite(dataset["eps_share"]).any():
        largest = dataset["largest_eps_share"].to_series()
        text += (
            f"; √v̂ < ε holds for {float(dataset['eps_share'].max()):.1%} of the coordinates of the operator with most, "
            f"for {largest.max():.1%} in the worst record ({largest.idxmax()})"
        )
    snr = float(dataset["snr"].median())
    if not np.isfinite(snr):
        return f"{text}."
    noise = float((dataset["snr"].median("step") / dataset["noise"]).median())
    beyond = f", {noise:.2f} times what noise alone gives" if np.isfinite(noise) else ""
    return f"{text}. Median |m̂|/√v̂ is {snr:.2g}{beyond}."


SHARES = (
    ("eps_share", "√v̂ < ε", {"marker": "o"}),
    ("near_eps_share", "√v̂ < 1000 ε", {"marker": "s", "markerfacecolor": "white"}),
)


def _lines(ax: Axes, dataset: xr.Dataset, name: str, *, legend: bool) -> None:
    """The operators' medians, on one grey area from the smallest lower to the largest upper edge: areas of their own would hide each other."""
    lower, upper = (dataset[f"{name}{suffix}"] for suffix in ("_lower", "_upper"))
    ax.fill_between(dataset["step"].values, lower.min("operator"), upper.max("operator"), color="0.5", alpha=0.12, linewidth=0)
    operator_lines(ax, dataset.drop_vars([f"{name}_lower", f"{name}_upper"]), name, legend=legend)


def _levels(ax: Axes, values: xr.DataArray, text: str, style: str, above: bool = True) -> None:
    """A line at each different value, its name above or under it."""
    for value in np.unique(values.values[np.isfinite(values.values) & (values.values > 0)]):
        ax.axhline(value, color="0.3", linestyle=style, linewidth=1)
        white = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}
        ax.annotate(
            f"{text} {value:.3g}", (0.99, value), (0, 3 if above else -3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="bottom" if above else "top",
            fontsize=8, bbox=white,
        )  # fmt: skip
